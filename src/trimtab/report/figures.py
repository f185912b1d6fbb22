"""The figures of a report, as Plotly descriptions: a strength curve and bars with intervals.

Colors are written as `var(--name)`: the page replaces them by its own, light or dark. The
functions take plain dicts (the shape of `demo.json`) and leave out what is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.results.tables import percent

Row = Mapping[str, Any]
Figure = dict[str, Any]

LEVERS = ("baseline", "prompt", "vector", "baked", "null")
LABELS = {
    "baseline": "unsteered",
    "prompt": "plain prompt",
    "vector": "vector",
    "baked": "baked checkpoint",
    "null": "random vector",
}
AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--line)",
    "zerolinecolor": "var(--line)",
    "tickfont": {"color": "var(--soft)"},
    "title": {"font": {"color": "var(--soft)"}},
    "automargin": True,
}


def levers_of(entry: Row) -> list[tuple[str, Row]]:
    """List the levers that were measured, in the order they are shown: (name, row)."""
    return [(name, entry[name]) for name in LEVERS if isinstance(entry.get(name), Mapping)]


def curve_rows(entry: Row, key: str = "curve") -> list[Row]:
    """List the rows of a curve by rising strength m."""
    return sorted(entry.get(key) or [], key=lambda row: row["strength"])


def null_band(rows: Sequence[Row]) -> tuple[list[float], list[float], list[float]]:
    """Reduce the null's rows to (strengths, lowest, highest): the band random directions stay in.

    The edges are the intervals' where there are some, else the lowest and highest score of the rows
    that share a strength.
    """
    edges: dict[float, tuple[float, float]] = {}
    for row in rows:
        low = row["low"] if row.get("low") is not None else row["score"]
        high = row["high"] if row.get("high") is not None else row["score"]
        seen = edges.get(row["strength"], (low, high))
        edges[row["strength"]] = (min(seen[0], low), max(seen[1], high))
    strengths = sorted(edges)
    return strengths, [edges[m][0] for m in strengths], [edges[m][1] for m in strengths]


def strength_curve(name: str, entry: Row) -> Figure:
    """Draw behavior and coherence (shares) above damage and spill (nats per token), against m.

    The window is shaded, the chosen strength marked, and the null's band lies behind the curve.
    """
    rows = curve_rows(entry)
    strengths = [row["strength"] for row in rows]
    data = _band(*null_band(curve_rows(entry, "null_curve")), color="var(--null-band)")
    data += [
        {
            **_line("behavior", strengths, [row["score"] for row in rows], "var(--vector)"),
            "error_y": _errors(rows, "var(--vector)"),
        },
        _line(
            "coherence",
            strengths,
            [row.get("coherence") for row in rows],
            "var(--coherence)",
            "dot",
        ),
        _line("damage", strengths, [row.get("damage") for row in rows], "var(--damage)", axis="y2"),
        _line(
            "spill",
            strengths,
            [row.get("spill") for row in rows],
            "var(--spill)",
            "dash",
            axis="y2",
        ),
    ]
    layout = base_layout()
    layout |= {
        "xaxis": {**AXIS, "title": axis_title("strength m"), "anchor": "y2", "zeroline": True},
        "yaxis": {
            **AXIS,
            "title": axis_title("share"),
            "range": [-0.03, 1.05],
            "domain": [0.44, 1],
            "tickformat": ".0%",
            "fixedrange": True,
        },
        "yaxis2": {
            **AXIS,
            "title": axis_title("nats per token"),
            "domain": [0, 0.34],
            "rangemode": "tozero",
            "fixedrange": True,
        },
        "shapes": _marks(entry),
        "hovermode": "x unified",
        "height": 460,
    }
    return {"data": data, "layout": layout, "label": describe_curve(name, entry)}


def lever_bars(name: str, entry: Row) -> Figure:
    """Draw a bar with its 95 % interval for each lever: unsteered, prompt, vector, baked, null."""
    levers = levers_of(entry)[::-1]  # Plotly draws the first bar at the bottom
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [LABELS[lever] for lever, _ in levers],
        "x": [row["score"] for _, row in levers],
        "marker": {"color": [f"var(--{lever})" for lever, _ in levers], "opacity": 0.8},
        "error_x": _errors([row for _, row in levers], "var(--ink)"),
        "text": [percent(row["score"]) for _, row in levers],
        "textposition": "none",
        "hovertemplate": "%{y}: %{text}<extra></extra>",
        "width": 0.62,
    }
    layout = base_layout()
    layout |= {
        "xaxis": {
            **AXIS,
            "title": axis_title(f"share of answers: {name}"),
            "range": [0, 1.03],
            "tickformat": ".0%",
            "fixedrange": True,
        },
        "yaxis": {**AXIS, "tickfont": {"color": "var(--ink)"}, "fixedrange": True},
        "showlegend": False,
        "height": 90 + 44 * len(levers),
    }
    return {"data": [bars], "layout": layout, "label": describe_bars(name, entry)}


def describe_curve(name: str, entry: Row) -> str:
    """Say in words what the curve shows, for readers who cannot see it."""
    rows = curve_rows(entry)
    if not rows:
        return f"{name}: no curve was measured."
    best = max(rows, key=lambda row: row["score"])
    text = (
        f"{name} against strength, {len(rows)} strengths from {rows[0]['strength']:g} to "
        f"{rows[-1]['strength']:g}; the behavior is strongest at {best['strength']:g} "
        f"with {percent(best['score'])}."
    )
    window = entry.get("window")
    return text + (f" Window: {window[0]:g} to {window[1]:g}." if window else "")


def describe_bars(name: str, entry: Row) -> str:
    """Say in words what the bars show."""
    shares = ", ".join(
        f"{LABELS[lever]} {percent(row['score'])}" for lever, row in levers_of(entry)
    )
    return f"{name}, share of answers by lever: {shares}."


def base_layout() -> Figure:
    """Return what every figure's layout starts from."""
    return {
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


def axis_title(text: str) -> Figure:
    """Return an axis title in the page's soft color."""
    return {"text": text, "font": {"color": "var(--soft)", "size": 12}}


def _line(
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    color: str,
    dash: str = "solid",
    axis: str = "y",
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "yaxis": axis,
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 6},
        "hovertemplate": "%{y:.2f}",
    }


def _band(x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> list[Any]:
    if not x:
        return []
    edge = {"type": "scatter", "mode": "lines", "x": list(x), "hoverinfo": "skip"}
    return [
        {**edge, "y": list(low), "line": {"width": 0}, "showlegend": False},
        {
            **edge,
            "y": list(high),
            "line": {"width": 0},
            "fill": "tonexty",
            "fillcolor": color,
            "name": "random vector",
        },
    ]


def _errors(rows: Sequence[Row], color: str) -> Figure:
    def reach(row: Row, edge: str, sign: int) -> float:
        return max(0.0, sign * (row[edge] - row["score"])) if row.get(edge) is not None else 0.0

    return {
        "type": "data",
        "symmetric": False,
        "array": [reach(row, "high", 1) for row in rows],
        "arrayminus": [reach(row, "low", -1) for row in rows],
        "color": color,
        "thickness": 1.2,
        "width": 4,
    }


def _marks(entry: Row) -> list[Figure]:
    marks: list[Figure] = []
    window = entry.get("window")
    if window:
        marks.append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": window[0],
                "x1": window[1],
                "y0": 0,
                "y1": 1,
                "line": {"width": 0},
                "fillcolor": "var(--window)",
                "layer": "below",
            }
        )
    if entry.get("strength") is not None:
        marks.append(
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": entry["strength"],
                "x1": entry["strength"],
                "y0": 0,
                "y1": 1,
                "line": {"color": "var(--soft)", "width": 1, "dash": "dot"},
            }
        )
    return marks
