"""What every choice of a strength is made of: curves, bounds, windows, the largest that keeps one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from trimtab.evaluation.evaluate import Evaluation, Evaluator
from trimtab.evaluation.summary import Summary, alpha_text, raw_alphas, summary, with_p95
from trimtab.results.tables import number, with_interval
from trimtab.steering.vector import VectorSteering

WIDTH = 1.05  # an edge is known to 5 % of strength
HALVINGS = 14
SLACK = 1.02  # of a budget: strengths are solved for to a few per cent of damage
COLUMNS = ("m", "side", "alpha", "score", "n", "coherence", "damage (p95)", "spill (p95)")


@dataclass(frozen=True, kw_only=True)
class SweepRow(Summary):
    """One strength in one direction.

    `sign` says which side is scored: that of the strength, and at m = 0 one row for each.
    """

    strength: float
    alphas: dict[int, float]

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.strength:+g}" if self.strength else "0",
            "toward" if self.sign > 0 else "away",
            alpha_text(self.alphas),
            with_interval(self.score, self.low, self.high),
            str(self.n),
            number(self.coherence),
            with_p95(self.damage, self.damage_p95),
            with_p95(self.spill, self.spill_p95),
        )


def sweep_row(steering: VectorSteering, result: Evaluation, seed: int) -> SweepRow:
    """Summarize one evaluation as a row of a curve."""
    return SweepRow(
        **vars(summary(result, seed)), strength=steering.strength, alphas=raw_alphas(steering)
    )


def curve(
    evaluator: Evaluator,
    vector: VectorSteering,
    strengths: Sequence[float],
    sign: int,
    *,
    seed: int = 0,
    samples: bool = False,
) -> list[SweepRow]:
    """Measure a vector at every strength m, together; the rows are in the order of the strengths.

    The vector's own strength does not matter; with `samples` the rows keep prompts and answers.
    """
    results = evaluator.run_many(vector, strengths, sign)
    rows = [sweep_row(vector.at(m), r, seed) for m, r in zip(strengths, results, strict=True)]
    return rows if samples else [replace(row, samples=()) for row in rows]


@dataclass(frozen=True)
class Bounds:
    """What a strength has to keep.

    Attributes:
        budget: greatest p95 damage in nats per token.
        coherence: least mean coherence.
        target: least score, for a strength to be inside the window.
        spill: greatest p95 spill in nats per token; None for no bound.
    """

    budget: float = 0.5
    coherence: float = 0.9
    target: float = 0.9
    spill: float | None = None

    def failing(self, row: Summary) -> str:
        """Return what breaks a bound, whatever the score: coherence, damage, spill, or nothing."""
        if row.coherence < self.coherence:
            return "coherence"
        if row.damage_p95 > self.budget:
            return "damage"
        spilled = 0.0 if row.spill_p95 is None else row.spill_p95
        return "spill" if self.spill is not None and spilled > self.spill else ""

    def kept(self, row: Summary) -> bool:
        """Whether a measurement reaches the target and breaks no bound."""
        return row.score >= self.target and not self.failing(row)


def windows(rows: Sequence[SweepRow], bounds: Bounds) -> list[tuple[float, float]]:
    """Return the ends of every run of neighboring strengths that keeps the bounds, by rising m.

    The unsteered model, m = 0, is in none.
    """
    runs: list[list[float]] = [[]]
    for row in sorted(rows, key=lambda row: row.strength):
        if row.strength and bounds.kept(row):
            runs[-1].append(row.strength)
        elif runs[-1]:
            runs.append([])
    return [(run[0], run[-1]) for run in runs if run]


def window(
    rows: Sequence[SweepRow], bounds: Bounds, near: float, *, elsewhere: bool = False
) -> tuple[float, float] | None:
    """Return the window of a curve of one side around a strength; None where it is in none.

    With `elsewhere` the widest window is taken where there is none around `near`.
    """
    found = [w for w in windows(rows, bounds) if elsewhere or inside(near, w)]
    return max(found, key=lambda w: (inside(near, w), w[1] - w[0]), default=None)


def inside(strength: float, window: tuple[float, float]) -> bool:
    """Whether a strength is in a window, its ends included."""
    # A stop of a slider may miss an end by the last digits alone.
    slack = 1e-3 * max(map(abs, window))
    return window[0] - slack <= strength <= window[1] + slack


def span(window: tuple[float, float]) -> str:
    """Write a window as text."""
    return f"{window[0]:+.3g} to {window[1]:+.3g}"


def largest_within(
    measure: Callable[[Sequence[float]], Sequence[float]],
    bound: float,
    *,
    first: float = 1.0,
    smallest: float | None = None,
    largest: float = math.inf,
    known: Mapping[float, float] | None = None,
    width: float = WIDTH,
    points: int = 3,
) -> tuple[float, float]:
    """Return the largest magnitude at which a figure keeps a bound, and the next one that does not.

    Magnitudes double, or halve, until two straddle the bound; then the edge is narrowed down in log
    strength. A figure need not rise with strength: this is the end of the first run, from 0 on, of
    the magnitudes measured.

    Args:
        measure: the figure at each of some magnitudes, |m|.
        bound: the figure's largest value.
        first: the magnitude tried first, where none is known.
        smallest: halving ends at or below it; by default after `HALVINGS` of `first`.
        largest: never passed.
        known: magnitude -> figure, measured before.
        width: ratio of the two magnitudes at which narrowing ends.
        points: magnitudes measured together while narrowing.

    Returns:
        (within, beyond): 0 where nothing tried keeps the bound, infinity where everything does.
    """
    first = min(first, largest)
    smallest = first * 2.0**-HALVINGS if smallest is None else smallest
    start = known or {first: measure([first])[0]}
    beyond = min((m for m, value in start.items() if value > bound), default=math.inf)
    within = max((m for m in start if m < beyond), default=0.0)
    while within < largest if beyond == math.inf else not within and beyond > smallest:
        m = min(2 * within, largest) if within else beyond / 2
        if measure([m])[0] > bound:
            beyond = m
        else:
            within = m
    while within and math.isfinite(beyond) and beyond / within > width:
        ratio = beyond / within
        between = [within * ratio ** (i / (points + 1)) for i in range(1, points + 1)]
        for m, value in zip(between, measure(between), strict=True):
            if value > bound:
                beyond = m
                break
            within = m
    return within, beyond
