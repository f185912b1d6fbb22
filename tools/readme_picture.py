"""The README's picture as one static SVG, from what a demo measured.

    python tools/readme_picture.py report/demo.json docs/images/demo.svg

Drawn by hand on an opaque card, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.results.files import written
from trimtab.results.tables import escape, percent

Row = Mapping[str, Any]
LABELS = {
    "baseline": "unsteered",
    "prompt": "plain prompt",
    "vector": "vector",
    "baked": "baked checkpoint",
    "null": "random control",
}
INK, SOFT, GRID, LINE, CARD = "#1d2530", "#545f6d", "#e8eaee", "#c6ccd4", "#ffffff"
VECTOR, COHERENCE, NULL = "#0b6e7f", "#4f7326", "#868d97"
COLORS = {
    "baseline": "#6a7481",
    "prompt": "#975900",
    "vector": VECTOR,
    "baked": "#3a5ba9",
    "null": NULL,
}
PANEL, GAP, PAD = 290, 34, 24  # pixels: a behavior's width, the space between two, the margin
PLOT_LEFT, PLOT_TOP, PLOT_HEIGHT = 34, 92, 150
TICK_ROOM = 32  # pixels from the middle of one label to the next
BAR_LEFT, BAR_STEP, BAR_HEIGHT = 112, 24, 13
MOST_PANELS = 3


def draw(data: Mapping[str, Any]) -> str:
    """Return the SVG text: up to three behaviors side by side, the curve above, the levers below."""
    measured = [(n, e) for n, e in (data.get("behaviors") or {}).items() if e.get("vector")]
    if not measured:
        raise TrimtabError(
            asked="a figure of measured behaviors",
            found="data in which no behavior has a 'vector' row",
            advice="give what demo.json holds, after a demo that found a vector",
        )
    panels = measured[:MOST_PANELS]
    bars_top = PLOT_TOP + PLOT_HEIGHT + 66
    most_bars = max(len(levers_of(entry)) for _, entry in panels)
    width = 2 * PAD + len(panels) * PANEL + (len(panels) - 1) * GAP
    height = bars_top + most_bars * BAR_STEP + PAD
    title = f"Steering {data.get('model', '?')}: " + ", ".join(name for name, _ in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}" font-size="12" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{CARD}" stroke="{LINE}"/>',
        _legend(PAD, 28),
    ]
    for index, (name, entry) in enumerate(panels):
        left = PAD + index * (PANEL + GAP)
        parts.append(_text(left, 64, name, INK, size=15, weight=600))
        parts.extend(_curve(left, entry))
        parts.extend(_bars(left, bars_top, entry))
    return "\n".join([*parts, "</svg>"]) + "\n"


def levers_of(entry: Row) -> list[tuple[str, Row]]:
    """List the levers that were measured, in the order they are shown: (name, row)."""
    return [(name, entry[name]) for name in LABELS if entry.get(name)]


def _curve(left: float, entry: Row) -> list[str]:
    x0, x1 = left + PLOT_LEFT, left + PANEL - 6
    y0, y1 = PLOT_TOP + PLOT_HEIGHT, PLOT_TOP
    rows = sorted(entry.get("curve") or [], key=lambda row: row["strength"])
    y = _scale(0, 1, y0, y1)
    parts = []
    for share in (0, 0.5, 1):
        parts.append(_line(x0, y(share), x1, y(share), LINE if share == 0 else GRID))
        parts.append(_text(x0 - 6, y(share) + 4, percent(share), SOFT, size=10, anchor="end"))
    if not rows:
        return [*parts, _text((x0 + x1) / 2, (y0 + y1) / 2, "no curve", SOFT, anchor="middle")]
    strengths = sorted({0.0, *(row["strength"] for row in rows)})
    low, high = strengths[0], strengths[-1]
    x = _scale(low, high if high > low else low + 1, x0, x1)
    window = entry.get("window")
    if window:
        a, b = x(max(window[0], low)), x(min(window[1], high))
        parts.append(
            f'<rect x="{a:.1f}" y="{y1}" width="{max(b - a, 1):.1f}" height="{y0 - y1}" '
            f'fill="{VECTOR}" fill-opacity="0.1"/>'
        )
    coherence = [(row["strength"], row.get("coherence")) for row in rows]
    parts.append(_path(x, y, coherence, COHERENCE, dash="2 3"))
    parts.append(_path(x, y, [(row["strength"], row["score"]) for row in rows], VECTOR))
    for row in rows:
        parts += _point(x(row["strength"]), y, row, VECTOR, VECTOR)
    # The test split upon it: unsteered at 0, the vector and random ones at the chosen strength.
    chosen = entry.get("strength", 0.0)
    for m, lever in ((0.0, "baseline"), (chosen, "null"), (chosen, "vector")):
        if entry.get(lever):
            parts += _point(x(m), y, entry[lever], COLORS[lever], CARD, radius=4)
    for m in _ticks(strengths, x):
        parts.append(_text(x(m), y0 + 15, f"{m:.3g}", SOFT, size=10, anchor="middle"))
    parts.append(_text((x0 + x1) / 2, y0 + 31, "strength m", SOFT, size=11, anchor="middle"))
    return parts


def _point(
    px: float, y: Callable[[float], float], row: Row, color: str, fill: str, radius: float = 2.6
) -> list[str]:
    parts = []
    if row.get("low") is not None and row.get("high") is not None:
        parts.append(_line(px, y(row["low"]), px, y(row["high"]), color))
    parts.append(
        f'<circle cx="{px:.1f}" cy="{y(row["score"]):.1f}" r="{radius}" fill="{fill}" '
        f'stroke="{color}" stroke-width="1.5"/>'
    )
    return parts


def _bars(left: float, top: float, entry: Row) -> list[str]:
    x0, x1 = left + BAR_LEFT, left + PANEL - 40
    x = _scale(0, 1, x0, x1)
    parts = []
    for index, (lever, row) in enumerate(levers_of(entry)):
        y = top + index * BAR_STEP
        middle = y + BAR_HEIGHT / 2
        parts.append(_text(x0 - 8, middle + 4, LABELS[lever], INK, size=11, anchor="end"))
        parts.append(
            f'<rect x="{x0}" y="{y}" width="{max(x(row["score"]) - x0, 0):.1f}" '
            f'height="{BAR_HEIGHT}" rx="1.5" fill="{COLORS[lever]}"/>'
        )
        if row.get("low") is not None and row.get("high") is not None:
            parts.append(_line(x(row["low"]), middle, x(row["high"]), middle, INK))
        parts.append(_text(x1 + 8, middle + 4, percent(row["score"]), INK, size=11))
    count = len(levers_of(entry))
    bottom = top + max(count - 1, 0) * BAR_STEP + BAR_HEIGHT + 3
    parts.append(_line(x0, top - 3, x0, bottom, LINE))
    return parts


def _legend(left: float, y: float) -> str:
    parts, x = [], left
    marks = (
        ("behavior, validation, 95 %", _line(0, y - 4, 22, y - 4, VECTOR, width=2)),
        ("coherence", _line(0, y - 4, 22, y - 4, COHERENCE, width=2, dash="2 3")),
        (
            "window",
            f'<rect y="{y - 10}" width="22" height="11" fill="{VECTOR}" fill-opacity="0.16"/>',
        ),
        ("test split", f'<circle cx="11" cy="{y - 4}" r="4" fill="{CARD}" stroke="{VECTOR}"/>'),
        ("random, test", f'<circle cx="11" cy="{y - 4}" r="4" fill="{CARD}" stroke="{NULL}"/>'),
    )
    for label, mark in marks:
        parts.append(
            f'<g transform="translate({x:.1f} 0)">{mark}{_text(28, y, label, SOFT, size=11)}</g>'
        )
        x += 48 + 6.2 * len(label)
    return "\n".join(parts) if x < left + 2.5 * PANEL else _narrow_legend(left, y)


def _narrow_legend(left: float, y: float) -> str:
    return _text(left, y, "line: validation, dotted: coherence, rings: test", SOFT, size=11)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Map [low, high] linearly to pixels [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(strengths: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Choose measured strengths to label: zero and both ends first, then what has room beside them."""
    kept: list[float] = []
    for m in [strengths[0], strengths[-1], 0.0, *strengths[::-1]]:
        if m in strengths and all(abs(x(m) - x(other)) >= TICK_ROOM for other in kept):
            kept.append(m)
    return sorted(kept)


def _path(
    x: Callable[[float], float],
    y: Callable[[float], float],
    points: Sequence[tuple[float, float | None]],
    color: str,
    dash: str = "",
) -> str:
    steps = " ".join(f"{x(m):.1f},{y(value):.1f}" for m, value in points if value is not None)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{steps}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'


def _line(
    x0: float, y0: float, x1: float, y1: float, color: str, width: float = 1, dash: str = ""
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" '
        f'stroke-width="{width}"{dashes}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    color: str,
    size: int = 12,
    anchor: str = "start",
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    with written(sys.argv[2]) as file:
        file.write_text(draw(json.loads(Path(sys.argv[1]).read_text())), encoding="utf-8")
