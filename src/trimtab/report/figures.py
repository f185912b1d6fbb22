"""The figures of a page, as Plotly descriptions: lines, bars, a grid of colors.

Colors are the page's CSS variables, `var(--name)`, light or dark. Each figure has a `label`, what it
shows in words. Names and ticks may be a model's tokens: they are shown as they are, never read as
markup, numbers or dates. What is not finite is left out of the drawing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from trimtab.errors import TrimtabError
from trimtab.results.tables import clean, number

Figure = dict[str, Any]

COLORS = (
    "--vector",
    "--prompt",
    "--baked",
    "--coherence",
    "--damage",
    "--spill",
    "--baseline",
    "--null",
)
DASHES = ("solid", "dash", "dot", "dashdot", "markers")
Values = Sequence[float | None] | torch.Tensor
AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--line)",
    "zerolinecolor": "var(--line)",
    "tickfont": {"color": "var(--soft)"},
    "title": {"font": {"color": "var(--soft)"}},
    "automargin": True,
}


class Series(NamedTuple):
    """One line: where nothing was measured y is None or nan.

    `dash` is `solid`, `dash`, `dot`, `dashdot`, or `markers` for points without a line. Series of
    one name share an entry in the legend.
    """

    name: str
    x: Values
    y: Values
    color: str = "--vector"
    dash: str = "solid"


class Band(NamedTuple):
    """A shaded area between two lines, e.g. an interval or the reach of random directions."""

    name: str
    x: Values
    low: Values
    high: Values
    color: str = "--null-band"


class Bars(NamedTuple):
    """One bar per label, with interval ends where there are some; one color, or one per label."""

    name: str
    values: Values
    color: str | Sequence[str] = "--vector"
    low: Values | None = None
    high: Values | None = None


def line_figure(
    x_label: str,
    y_label: str,
    series: Sequence[Series | tuple[Any, ...]],
    *,
    description: str,
    caption: str = "",
    log_x: bool = False,
    log_y: bool = False,
    bands: Sequence[Band | tuple[Any, ...]] = (),
    window: tuple[float | None, float | None] | None = None,
    height: int = 380,
) -> Figure:
    """Draw lines over a shared axis.

    Args:
        x_label: with its unit.
        y_label: with its unit.
        series: `Series`, or tuples of the same fields.
        description: what the figure shows, in words.
        caption: printed below it.
        log_x: a logarithmic axis; values of 0 and less are left out.
        log_y: the same for y.
        bands: `Band`, or tuples of the same fields; drawn behind the lines.
        window: strengths to shade, (low, high); drawn only when both are finite.
        height: in pixels.

    Raises:
        TrimtabError: for an unknown color or dash, or x and y of different lengths.
    """
    data: list[Figure] = []
    for band in bands:
        data += _band(Band(*cast(tuple[Any, ...], band)))
    named: set[str] = {str(trace["name"]) for trace in data if trace.get("name")}
    for one in (Series(*cast(tuple[Any, ...], given)) for given in series):
        data.append(
            {**_trace(one), "legendgroup": _shown(one.name), "showlegend": one.name not in named}
        )
        named.add(one.name)
    layout = _layout(height, x_label, y_label)
    layout["xaxis"] |= {"type": "log"} if log_x else {"zeroline": True}
    layout["yaxis"] |= {"type": "log", "exponentformat": "power"} if log_y else {}
    layout |= {"shapes": _window(window), "showlegend": len(named) > 1, "hovermode": "closest"}
    return _figure(data, layout, description, caption)


def bar_figure(
    labels: Sequence[str],
    value_label: str,
    bars: Sequence[Bars | tuple[Any, ...]],
    *,
    description: str,
    caption: str = "",
) -> Figure:
    """Draw horizontal bars, one group per label, the first at the top.

    Args:
        labels: one per group.
        value_label: of the axis, with its unit.
        bars: `Bars`, or tuples of the same fields, with one value per label.
        description: what the figure shows, in words.
        caption: printed below it.
    """
    ticks = _distinct(labels)
    data: list[Figure] = []
    for one in (Bars(*cast(tuple[Any, ...], given)) for given in bars):
        values = _same_length(one.name, _plain(one.values), ticks)
        named = one.color
        color = _color(named) if isinstance(named, str) else [_color(each) for each in named]
        bar = {
            "type": "bar",
            "orientation": "h",
            "name": _shown(one.name),
            "y": ticks,
            "x": values,
            "marker": {"color": color, "opacity": 0.8},
            "hovertemplate": "%{y}: %{x:.4g}<extra>%{fullData.name}</extra>",
        }
        if one.low is not None and one.high is not None:
            bar["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": _reach(values, _plain(one.high), 1),
                "arrayminus": _reach(values, _plain(one.low), -1),
                "color": "var(--ink)",
                "thickness": 1.2,
                "width": 4,
            }
        data.append(bar)
    layout = _layout(90 + len(ticks) * (16 + 22 * len(bars)), value_label, "")
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "zeroline": False}
    layout |= {"showlegend": len(bars) > 1, "barmode": "group"}
    return _figure(data, layout, description, caption)


def heat_figure(
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    values: Sequence[Sequence[float | None]] | torch.Tensor,
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    description: str,
    caption: str = "",
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
) -> Figure:
    """Draw a grid of colors, the first row at the top.

    Args:
        x_labels: one per column.
        y_labels: one per row.
        values: [rows, columns]; None or nan leaves a hole.
        x_label: of the columns.
        y_label: of the rows.
        value_label: of the color bar, with its unit.
        description: what the figure shows, in words.
        caption: printed below it.
        low: value of the first color; the least when not given.
        high: value of the last color; the greatest when not given.
        diverging: 0 has the page's color, negative and positive values one color each.
    """
    columns, rows = _distinct(x_labels), _distinct(y_labels)
    grid = [_same_length("a row", _plain(row), columns) for row in _same_length("y", values, rows)]
    two, one = (("--damage", 0.0), ("--card", 0.5)), (("--card", 0.0),)
    scale = [*(two if diverging else one), ("--vector", 1.0)]
    seen = [value for row in grid for value in row if value is not None] or [0.0]
    bottom, top = min(seen) if low is None else low, max(seen) if high is None else high
    if diverging:
        top = max(abs(bottom), abs(top))
        bottom = -top
    heat = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": grid,
        "zmin": bottom,
        "zmax": top,
        "colorscale": [[at, f"var({color})"] for color, at in scale],
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "title": {**_axis_title(_shown(value_label)), "side": "right"},
            "tickfont": {"color": "var(--soft)"},
            "thickness": 12,
            "outlinewidth": 0,
        },
        "hovertemplate": "%{x}, %{y}: %{z:.4g}<extra></extra>",
    }
    layout = _layout(max(240, 120 + 24 * len(rows)), x_label, y_label)
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    return _figure([heat], layout, description, caption)


def described(name: str, x: Values, y: Values) -> str:
    """Say in words where a line starts, ends, and is highest and lowest."""
    points = [
        (a, b) for a, b in zip(_plain(x), _plain(y), strict=True) if a is not None and b is not None
    ]
    if not points:
        return f"{name}: nothing measured"
    (x0, y0), (x1, y1) = points[0], points[-1]
    top, bottom = max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])
    return (
        f"{name}: from {number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}, highest "
        f"{number(top[1])} at {number(top[0])}, lowest {number(bottom[1])} at {number(bottom[0])}"
    )


def _trace(series: Series) -> Figure:
    if series.dash not in DASHES:
        raise _refusal(f"the line style {series.dash!r}", f"choose one of: {', '.join(DASHES)}")
    color, points = _color(series.color), series.dash == "markers"
    x = _plain(series.x)
    return {
        "type": "scatter",
        "mode": "markers" if points else "lines",
        "name": _shown(series.name),
        "x": x,
        "y": _same_length(series.name, _plain(series.y), x),
        "line": {"color": color, "width": 2, "dash": "solid" if points else series.dash},
        "marker": {"color": color, "size": 6},
        "hovertemplate": "%{x:.4g}: %{y:.4g}<extra>%{fullData.name}</extra>",
    }


def _band(band: Band) -> list[Figure]:
    x = _plain(band.x)
    edge = {"type": "scatter", "mode": "lines", "x": x, "hoverinfo": "skip", "line": {"width": 0}}
    return [
        {**edge, "y": _same_length(band.name, _plain(band.low), x), "showlegend": False},
        {
            **edge,
            "y": _same_length(band.name, _plain(band.high), x),
            "fill": "tonexty",
            "fillcolor": _color(band.color, ("--null-band", "--window")),
            "name": _shown(band.name),
        },
    ]


def _window(window: tuple[float | None, float | None] | None) -> list[Figure]:
    ends = [end for end in window or () if end is not None and math.isfinite(end)]
    if len(ends) != 2:
        return []
    shade = {"line": {"width": 0}, "fillcolor": "var(--window)", "layer": "below"}
    across = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    return [{**across, **shade, "x0": min(ends), "x1": max(ends)}]


def _layout(height: int, x_label: str, y_label: str) -> Figure:
    axes = [
        {**AXIS, "title": _axis_title(_shown(one)), "fixedrange": True}
        for one in (x_label, y_label)
    ]
    return {
        "height": height,
        "xaxis": axes[0],
        "yaxis": axes[1],
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "normal",
        },
        "hoverlabel": {"bgcolor": "var(--card)", "font": {"color": "var(--ink)"}},
        "dragmode": False,
    }


def _figure(data: list[Figure], layout: Figure, description: str, caption: str) -> Figure:
    return {
        "data": data,
        "layout": layout,
        "label": clean(description),
        "caption": clean(caption),
    }


def _axis_title(text: str) -> Figure:
    return {"text": text, "font": {"color": "var(--soft)", "size": 12}}


def _plain(values: Values) -> list[float | None]:
    given = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    return [float(v) if v is not None and math.isfinite(v) else None for v in given]


def _reach(values: Sequence[float | None], ends: Sequence[float | None], sign: int) -> list[float]:
    return [
        max(0.0, sign * (end - value)) if end is not None and value is not None else 0.0
        for value, end in zip(values, ends, strict=True)
    ]


def _shown(text: str) -> str:
    # Plotly reads a few HTML tags in names and ticks.
    return html.escape(clean(text), quote=False)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Make equal labels different, for a category axis would draw them in one place."""
    seen: dict[str, int] = {}
    result: list[str] = []
    for label in map(_shown, labels):
        seen[label] = seen.get(label, 0) + 1
        result.append(label + "\u200b" * (seen[label] - 1))
    return result


def _same_length(name: str, values: Any, against: Sequence[object]) -> Any:
    if len(values) != len(against):
        raise _refusal(
            f"{len(values)} values of {name} for {len(against)} places", "give one value per place"
        )
    return values


def _color(name: str, allowed: Sequence[str] = COLORS) -> str:
    if name not in allowed:
        raise _refusal(f"the color {name!r}", f"choose one of: {', '.join(allowed)}")
    return f"var({name})"


def _refusal(found: str, advice: str) -> TrimtabError:
    return TrimtabError(asked="a figure", found=found, advice=advice)
