"""What the page shows, as HTML: answers, gauges, colors, warnings. All text in it is inert."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.measurement import Measurement
from trimtab.results.tables import Table, escape, number
from trimtab.steering.units import convert
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import SweepRow, inside, span
from trimtab.studio.lever import Lever

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 8.0, 34.0
LINES = (("score", "behavior"), ("coherence", "coherence"), ("damage", "damage / budget"))
# A page that draws HTML from a template must not find one in it.
_TEMPLATES = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})


def inert(text: str) -> str:
    """Escape text for HTML and for templates that the HTML may pass through."""
    return escape(text).translate(_TEMPLATES)


def answers_view(before: str, after: str, strength: float, done: bool) -> str:
    """Show the two answers side by side, below each other where there is no room."""
    steered = "unsteered, m = 0" if strength == 0 else f"steered, m = {strength:+.3g}"
    return (
        f'<div class="tt-pair" data-m="{strength:g}" data-done="{int(done)}">'
        f'<section class="tt-card"><h3>unsteered</h3><p id="tt-before">{inert(before)}</p></section>'
        f'<section class="tt-card tt-steered"><h3>{steered}</h3>'
        f'<p id="tt-after">{inert(after)}</p></section></div>'
    )


def tokens_view(
    before: Sequence[tuple[str, float]],
    after: Sequence[tuple[str, float]],
    vector: VectorSteering,
) -> str:
    """Show both answers' tokens, colored by their projection on the direction."""
    return (
        f'<div class="tt-pair tt-tokens"><section class="tt-card"><h3>unsteered</h3>'
        f'<p>{_colored(before)}</p></section><section class="tt-card tt-steered"><h3>steered</h3>'
        f'<p>{_colored(after)}</p></section></div><p class="tt-note"><span class="tt-key" '
        f'style="background:{_color(-1)}">away</span> <span class="tt-key" '
        f'style="background:{_color(1)}">toward</span> Projection on the direction at '
        f"{inert(vector.site)} of layer {vector.layers[0]}, read without the steering, so that "
        f"its own push does not color every word.</p>"
    )


def gauges_view(lever: Lever, reading: SweepRow) -> str:
    """Show score, coherence and damage at a strength, and the curves with the window shaded."""
    bounds = lever.bounds
    bars = (
        _bar("behavior", reading.score, f"{reading.score:.0%}", reading.score < bounds.target),
        _bar("coherence", reading.coherence, f"{reading.coherence:.0%}",
             reading.coherence < bounds.coherence),
        _bar("damage (on-target KL)", reading.damage_p95 / bounds.budget / 2,
             f"{number(reading.damage_p95, 3)} nats (budget {bounds.budget:g})",
             reading.damage_p95 > bounds.budget),
    )  # fmt: skip
    side = "toward" if reading.sign > 0 else "away"
    asked, strength = len(reading.samples), convert(lever.vector.at(reading.strength)).sentence
    return (
        f'<div class="tt-gauges" data-m="{reading.strength:g}" data-score="{reading.score:.3f}" '
        f'data-kl="{reading.damage_p95:.4f}"><div class="tt-bars">{"".join(bars)}'
        f'<p class="tt-note">{strength}. Behavior: share of {asked} held-out answers that show the '
        f"{side} side; damage: KL per token, 95th percentile, along answers that already show it."
        f"</p></div>"
        f"{_chart(lever, reading)}</div>"
    )


def warnings_view(lever: Lever, strength: float) -> str:
    """Show what is wrong with a strength, or that nothing is."""
    said = lever.warnings(strength)
    if said:
        items = " ".join(inert(line) for line in said)
        return f'<div class="tt-warning" role="alert"><b>Outside the window.</b> {items}</div>'
    window = lever.window(lever.side_of(strength))
    if strength == 0 or window is None:
        return '<div class="tt-fine">Steering is off at m = 0.</div>'
    return f'<div class="tt-fine">Inside the window, {span(window)}.</div>'


def samples_view(reading: SweepRow) -> str:
    """Show the answers behind the gauges."""
    rows = tuple((_said(one.prompt), one.before, one.after) for one in reading.samples)
    return _scrolling(Table("", ("prompt", "unsteered", "steered"), rows))


def measurement_view(found: Measurement) -> str:
    """Show levers side by side."""
    return f'<div id="tt-levers">{_scrolling(found.table())}</div>'


def lever_view(behavior: Behavior, lever: Lever, note: str) -> str:
    """Say which vector is on the slider."""
    vector = lever.vector
    layers = ", ".join(map(str, vector.layers))
    windows = [lever.window(side) for side in (-1, 1)]
    window = "; ".join(span(each) for each in windows if each is not None)
    return (
        f'<div class="tt-fine"><b>{inert(behavior.name)}</b>: {inert(note)}. '
        f"{inert(vector.operation)} at {inert(vector.site)} of layer{'s' * (len(vector.layers) > 1)}"
        f" {layers}, scope {inert(str(vector.scope))}. "
        f"{'Window on held-out prompts ' + window if window else 'No window on held-out prompts'}.</div>"
    )


def refusal_view(error: TrimtabError) -> str:
    """Show what was asked, what was found and what to do."""
    return (
        f'<div class="tt-warning" role="alert"><b>{inert(error.asked)}</b><br>'
        f"{inert(error.found)}<br><i>{inert(error.advice)}</i></div>"
    )


def link_view(url: str, name: str, size: int) -> str:
    """Show a link to a file that was made."""
    return (
        f'<div class="tt-fine"><a class="tt-link" href="{inert(url)}" download>Download '
        f"{inert(name)}</a> ({size / 2**20:.1f} MB)</div>"
    )


def page_view(url: str) -> str:
    """Show a page that was made: a link, and the page itself behind a wall."""
    # Without allow-same-origin the page can run its figures, but nothing of this one.
    return (
        f'<p><a class="tt-link" href="{inert(url)}" target="_blank" rel="noopener">Open the page'
        f'</a></p><iframe class="tt-page" src="{inert(url)}" sandbox="allow-scripts" '
        f'title="Why it works"></iframe>'
    )


def _scrolling(table: Table) -> str:
    return f'<div class="tt-scroll">{table.to_html().translate(_TEMPLATES)}</div>'


def _said(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else " / ".join(m["content"] for m in prompt)


def _colored(tokens: Sequence[tuple[str, float]]) -> str:
    return "".join(
        f'<span style="background:{_color(shade)}" title="{shade:+.2f}">{inert(text)}</span>'
        for text, shade in tokens
    )


def _color(shade: float) -> str:
    red, green, blue = (13, 148, 136) if shade > 0 else (234, 88, 12)
    return f"rgba({red},{green},{blue},{0.75 * abs(shade):.2f})"


def _bar(name: str, share: float, text: str, bad: bool) -> str:
    width = 100 * max(0.0, min(1.0, share))
    return (
        f'<div class="tt-bar{" tt-bad" if bad else ""}"><span>{name}</span><b>{text}</b>'
        f'<i><i style="width:{width:.0f}%"></i></i></div>'
    )


def _chart(lever: Lever, reading: SweepRow) -> str:
    """The curves of both sides over the slider's range; damage as a share of the budget."""
    reach, budget = lever.reach, lever.bounds.budget

    def x(m: float) -> float:
        return LEFT + (m + reach) / (2 * reach) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return TOP + (1 - max(0.0, min(1.0, share))) * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    shaded = "".join(
        f'<rect class="tt-window" x="{x(w[0]):.1f}" y="{TOP}" width="{max(2, x(w[1]) - x(w[0])):.1f}" '
        f'height="{base - TOP}"/>'
        for w in map(lever.window, (-1, 1))
        if w is not None
    )
    paths = ""
    for side in (-1, 1):
        curve = [r for r in lever.curve(side) if abs(r.strength) <= reach]
        for name, _ in LINES:
            shares = [
                r.damage_p95 / budget if name == "damage" else getattr(r, name) for r in curve
            ]
            points = " ".join(
                f"{x(r.strength):.1f},{y(s):.1f}" for r, s in zip(curve, shares, strict=True)
            )
            paths += f'<polyline class="tt-{name}" points="{points}"/>'
    grid = "".join(
        f'<line class="tt-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(s):.1f}" y2="{y(s):.1f}"/>'
        f'<text x="{LEFT - 4}" y="{y(s) + 4:.1f}" text-anchor="end">{s:.0%}</text>'
        for s in (0.0, 0.5, 1.0)
    )
    ends = {-reach: "start", reach: "end"}
    ticks = "".join(
        f'<text x="{x(m):.1f}" y="{base + 13:.1f}" text-anchor="{ends.get(m, "middle")}">'
        f"{m:{'+' if m else ''}.3g}</text>"
        for m in (-reach, -reach / 2, 0, reach / 2, reach)
    )
    window = lever.window(lever.side_of(reading.strength))
    good = window is not None and inside(reading.strength, window)
    marker = (
        f'<line class="tt-marker{"" if good else " tt-out"}" x1="{x(reading.strength):.1f}" '
        f'x2="{x(reading.strength):.1f}" y1="{TOP}" y2="{base}"/>'
    )
    legend = "".join(
        f'<text class="tt-{name}" x="{LEFT + 8 + 104 * i}" y="{HEIGHT - 6}">{label}</text>'
        for i, (name, label) in enumerate(LINES)
    )
    return (
        f'<svg class="tt-chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="behavior, coherence and damage against strength, window shaded">'
        f"{shaded}{grid}{paths}{marker}{ticks}{legend}</svg>"
    )
