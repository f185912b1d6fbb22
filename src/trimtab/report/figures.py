"""The figures of a page, made with Plotly: lines, bars, a grid of colors.

Colors are the page's CSS variables, `var(--name)`, light or dark. Each figure has a `label`, what it
shows in words. Names and ticks may be a model's tokens: they are shown as they are, never read as
markup, numbers or dates. What is not finite is left out of the drawing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch

from trimtab.results.tables import clean, number, with_interval

Figure = dict[str, Any]  # `data` and `layout` for Plotly, `label` and `caption` for the page
Values = Sequence[float | None] | torch.Tensor
Measured = float | tuple[float | None, float | None, float | None] | None

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
SOFT = {"color": "var(--soft)"}
TITLE = {"font": {**SOFT, "size": 12}}
AXIS = {
    "gridcolor": "var(--grid)",
    "showline": True,
    "linecolor": "var(--line)",
    "zerolinecolor": "var(--line)",
    "tickfont": SOFT,
    "title": TITLE,
    "automargin": True,
    "fixedrange": True,
}
TEMPLATE = go.layout.Template(
    layout={
        "xaxis": AXIS,
        "yaxis": AXIS,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "hoverlabel": {"bgcolor": "var(--card)", "font": {"color": "var(--ink)"}},
        "dragmode": False,
    },
    data={
        "scatter": [
            go.Scatter(
                line_width=2,
                marker_size=6,
                hovertemplate="%{x:.4g}: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
        ],
        "bar": [
            go.Bar(
                marker_opacity=0.8,
                error_x={"color": "var(--ink)", "thickness": 1.2, "width": 4},
                hovertemplate="%{y}: %{x:.4g}<extra>%{fullData.name}</extra>",
            )
        ],
        "heatmap": [
            go.Heatmap(
                hoverongaps=False,
                xgap=1,
                ygap=1,
                colorbar={
                    "tickfont": SOFT,
                    "title": {**TITLE, "side": "right"},
                    "thickness": 12,
                    "outlinewidth": 0,
                },
                hovertemplate="%{x}, %{y}: %{z:.4g}<extra></extra>",
            )
        ],
    },
)


class Series(NamedTuple):
    """One line: where nothing was measured y is None or nan.

    `dash` is one of Plotly's, or `markers` for points without a line. Series of one name share an
    entry in the legend.
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


class Bars(NamedTuple):
    """One bar per label, `value` or `(value, low, high)`; one color, or one per label."""

    name: str
    values: Sequence[Measured]
    color: str | Sequence[str] = "--vector"


def line_figure(
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    description: str = "",
    caption: str = "",
    log_x: bool = False,
    log_y: bool = False,
    bands: Sequence[Band] = (),
    window: tuple[float, float] | None = None,
    height: int = 380,
) -> Figure:
    """Draw lines over a shared axis, bands behind them; labels are given with their units.

    `description` says in words what is shown, by default every line. On a logarithmic axis values of
    0 and less are left out. The window is shaded where both of its ends are finite.
    """
    drawn = _empty(height, x_label, y_label)
    for band in bands:
        edge = {"x": _finite(band.x), "mode": "lines", "line_width": 0, "hoverinfo": "skip"}
        drawn.add_scatter(**edge, y=_finite(band.low), showlegend=False)
        shade = {"fill": "tonexty", "fillcolor": "var(--null-band)"}
        drawn.add_scatter(**edge, **shade, y=_finite(band.high), name=_shown(band.name))
    named = {band.name for band in bands}
    for name, x, y, color, dash in series:
        assert len(x) == len(y), f"{len(y)} values of {name} for {len(x)} places"
        drawn.add_scatter(
            x=_finite(x),
            y=_finite(y),
            name=_shown(name),
            legendgroup=_shown(name),
            showlegend=name not in named,
            marker_color=_color(color),
            **({"mode": "markers"} if dash == "markers" else {"mode": "lines", "line_dash": dash}),
            line_color=_color(color),
        )
        named.add(name)
    drawn.update_layout(showlegend=len(named) > 1)
    if log_x:
        drawn.update_xaxes(type="log")
    if log_y:
        drawn.update_yaxes(type="log", exponentformat="power")
    if window is not None and all(map(math.isfinite, window)):
        low, high = sorted(window)
        drawn.add_vrect(low, high, line_width=0, fillcolor="var(--window)", layer="below")
    said = "; ".join(described(one.name, one.x, one.y) for one in series)
    return _figure(drawn, description or f"{y_label}, by {x_label}. {said}", caption)


def bar_figure(
    labels: Sequence[str], value_label: str, bars: Sequence[Bars], *, caption: str = ""
) -> Figure:
    """Draw horizontal bars, one group per label, the first at the top; described by every value."""
    drawn, said = _empty(90 + len(labels) * (16 + 22 * len(bars)), value_label, ""), []
    for one in bars:
        assert len(one.values) == len(labels), f"{len(one.values)} values for {len(labels)} labels"
        ends = [v if isinstance(v, tuple) else (v, None, None) for v in one.values]
        values, low, high = (_finite(end[i] for end in ends) for i in range(3))
        told = map(with_interval, values, low, high)
        shown = ", ".join(f"{label} {text}" for label, text in zip(labels, told, strict=True))
        said.append(f"{one.name}: {shown}")
        reach = {"array": _reach(values, high, 1), "arrayminus": _reach(values, low, -1)}
        intervals = any(isinstance(value, tuple) for value in one.values)
        colors = [one.color] * len(labels) if isinstance(one.color, str) else one.color
        drawn.add_bar(
            orientation="h",
            name=_shown(one.name),
            y=_distinct(labels),
            x=values,
            marker_color=list(map(_color, colors)),
            error_x={"symmetric": False, **reach} if intervals else None,
        )
    drawn.update_yaxes(type="category", autorange="reversed")
    return _figure(drawn, f"{value_label}. {'; '.join(said)}", caption)


def heat_figure(
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    values: Sequence[Values] | torch.Tensor,
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    description: str,
    caption: str = "",
    ends: tuple[float, float] | None = None,
    diverging: bool = False,
) -> Figure:
    """Draw a grid of colors from values `[rows, columns]`, the first row at the top.

    None or nan leaves a hole. `ends` are the values of the first and last color, by default the least
    and the greatest. When diverging, 0 has the page's color, negative and positive values one each.
    """
    grid = [_finite(row) for row in values]
    assert [len(row) for row in grid] == [len(x_labels)] * len(y_labels), "one value per place"
    colors = ["--damage"] * diverging + ["--card", "--vector"]
    scale = {
        "colorscale": [[i / (len(colors) - 1), f"var({c})"] for i, c in enumerate(colors)],
        "zmid": 0 if diverging else None,
        **({} if ends is None else {"zmin": ends[0], "zmax": ends[1]}),
    }
    drawn = _empty(max(240, 120 + 24 * len(y_labels)), x_label, y_label)
    drawn.add_heatmap(
        x=_distinct(x_labels),
        y=_distinct(y_labels),
        z=grid,
        colorbar_title_text=_shown(value_label),
        **scale,
    )
    drawn.update_xaxes(type="category", showgrid=False)
    drawn.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return _figure(drawn, description, caption)


def described(name: str, x: Values, y: Values) -> str:
    """Say in words where a line starts, ends, and is highest and lowest."""
    points = [
        (a, b)
        for a, b in zip(_finite(x), _finite(y), strict=True)
        if a is not None and b is not None
    ]
    if not points:
        return f"{name}: nothing measured"
    if len(points) < 3:
        return f"{name}: " + ", ".join(f"{number(b)} at {number(a)}" for a, b in points)
    (x0, y0), (x1, y1) = points[0], points[-1]
    top, bottom = max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])
    return (
        f"{name}: from {number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}, highest "
        f"{number(top[1])} at {number(top[0])}, lowest {number(bottom[1])} at {number(bottom[0])}"
    )


def _empty(height: int, x_label: str, y_label: str) -> go.Figure:
    titles = {"xaxis_title_text": _shown(x_label), "yaxis_title_text": _shown(y_label)}
    return go.Figure(layout={"template": TEMPLATE, "height": height, **titles})


def _figure(drawn: go.Figure, description: str, caption: str) -> Figure:
    return {**drawn.to_plotly_json(), "label": clean(description), "caption": clean(caption)}


def _finite(values: Iterable[float | None] | torch.Tensor) -> list[float | None]:
    given = values.tolist() if isinstance(values, torch.Tensor) else values
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
    return [_shown(label) + "\u200b" * labels[:i].count(label) for i, label in enumerate(labels)]


def _color(name: str) -> str:
    assert name in COLORS, f"{name} is no color of the page"
    return f"var({name})"
