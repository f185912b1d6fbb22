"""A vector measured over the range of a slider: its curve, its window, and what is wrong outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from trimtab.evaluation.evaluate import Evaluator
from trimtab.results import Progress
from trimtab.results.tables import number
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import Bounds, SweepRow, curve, inside, span, window
from trimtab.strength.tune import Tuned

# Strengths measured beforehand on each side of 0; the slider has STEPS stops between two of them.
GRID = 10
STEPS = 4
# The range grows until the text falls apart, but not further than this multiple of the first one.
FURTHEST = 16


@dataclass(frozen=True, eq=False)
class Lever:
    """One user's vector, at the strength it was found or tuned at, with what was measured so far.

    The slider goes from -reach to +reach; `tuned` is the window that tuning confirmed on its own
    prompts; `readings`, (side, m) -> what the gauges show, grow while the slider is moved.
    """

    vector: VectorSteering
    evaluator: Evaluator
    bounds: Bounds
    lock: AbstractContextManager[object]
    reach: float
    tuned: tuple[float, float] | None = None
    readings: dict[tuple[int, float], SweepRow] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """The side that the vector's own strength is on."""
        return -1 if self.vector.strength < 0 else 1

    @property
    def step(self) -> float:
        """The distance of two stops of the slider."""
        return self.reach / GRID / STEPS

    def side_of(self, strength: float) -> int:
        """Return the side that a strength is scored on; 0 belongs to the vector's own."""
        return self.side if strength == 0 else (1 if strength > 0 else -1)

    def curve(self, side: int) -> list[SweepRow]:
        """Return the readings of a side by rising strength, the unsteered one among them."""
        return sorted(
            (r for (at, _), r in self.readings.items() if at == side), key=lambda r: r.strength
        )

    def known(self, strength: float) -> bool:
        """Whether a strength was measured before."""
        return (self.side_of(strength), round(float(strength), 6)) in self.readings

    def window(self, side: int) -> tuple[float, float] | None:
        """Return the lowest and highest m inside, by everything read so far; None where none is.

        A few prompts may miss a target that more prompts reached while tuning: then that one counts.
        """
        found = window(self.curve(side), self.bounds, self.vector.strength, elsewhere=True)
        return self.tuned if found is None and side == self.side else found

    def read(self, strength: float) -> SweepRow:
        """Return the gauges at a strength, measured now where they were not before."""
        side, m = self.side_of(strength), round(float(strength), 6)
        if (side, m) not in self.readings:
            measure_at(self, [m], side)
        return self.readings[side, m]

    def warnings(self, strength: float) -> list[str]:
        """Say in sentences what is wrong with a strength; nothing inside the window and at 0."""
        if strength == 0:
            return []
        reading, ends = self.read(strength), self.window(self.side_of(strength))
        said = []
        if ends is not None and not inside(strength, ends):
            weak = abs(strength) < min(map(abs, ends))
            what = "weaker than" if weak else "stronger than"
            said.append(f"m = {strength:+.3g} is {what} the window, {span(ends)}.")
        elif ends is None:
            direction = "toward" if strength > 0 else "away from"
            said.append(
                f"No strength measured {direction} the behavior reaches a score of "
                f"{self.bounds.target:.0%} within the budget."
            )
        if reading.coherence < self.bounds.coherence:
            said.append(
                f"The text falls apart: coherence {reading.coherence:.0%}, "
                f"at least {self.bounds.coherence:.0%} is asked for."
            )
        if reading.damage_p95 > self.bounds.budget:
            said.append(
                f"Damage (on-target KL) of {number(reading.damage_p95)} nats per token (95th "
                f"percentile) exceeds the budget of {self.bounds.budget:g}."
            )
        return said


def measure_lever(
    evaluator: Evaluator,
    vector: VectorSteering,
    bounds: Bounds,
    lock: AbstractContextManager[object],
    progress: Progress | None = None,
) -> Lever:
    """Measure a vector on both sides of 0, as far as the text holds, and read its windows.

    The first range is twice the vector's own strength; progress is in grid points.
    """
    first = nice(2 * abs(vector.strength) or 2.0)
    tuned = vector.report.window if isinstance(vector, Tuned) else None
    lever = Lever(vector, evaluator, bounds, lock, first, tuned)
    done = 0
    for side in (lever.side, -lever.side):
        for group in groups(lever.reach, side):
            measure_at(lever, group, side)
            done += len(group)
            if progress is not None:
                progress(min(done, 2 * GRID), 2 * GRID)
        while side == lever.side and _may_grow(lever, side, first):
            lever = replace(lever, reach=2 * lever.reach)
            for group in groups(lever.reach, side):
                measure_at(lever, group, side)
        measure_at(lever, _edges(lever, side), side)
    return lever


def groups(reach: float, side: int) -> list[list[float]]:
    """Return the grid of a side, in parts small enough that others get their turn between them."""
    points = [round(side * reach * i / GRID, 6) for i in range(GRID + 1)]
    return [points[: GRID // 2 + 1], points[GRID // 2 + 1 :]]


def measure_at(lever: Lever, strengths: Sequence[float], side: int) -> None:
    """Measure the strengths that were not measured before, together."""
    missing = [m for m in strengths if (side, m) not in lever.readings]
    if not missing:
        return
    with lever.lock:
        rows = curve(lever.evaluator, lever.vector, missing, side, samples=True)
    lever.readings.update(((side, row.strength), row) for row in rows)


def _edges(lever: Lever, side: int) -> list[float]:
    """The slider's stops between the window's ends and the grid's next points outside."""
    ends = lever.window(side)
    if ends is None:
        return []
    stops = [lever.step * i for i in range(1, STEPS)]
    points = [ends[0] - stop for stop in stops] + [ends[1] + stop for stop in stops]
    return [round(m, 6) for m in points if 0 < side * m < lever.reach]


def nice(value: float) -> float:
    """Round upwards to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(round(value / unit, 6)) * unit, 10)


def _may_grow(lever: Lever, side: int, first: float) -> bool:
    """Whether the text and the budget still hold at the far end."""
    end = lever.readings[side, round(side * lever.reach, 6)]
    return not lever.bounds.failing(end) and lever.reach < FURTHEST * first
