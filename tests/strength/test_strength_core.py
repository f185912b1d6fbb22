"""The core that every choice of a strength calls: bounds, curve, window and the largest within."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import pytest

import planted
from trimtab.evaluation.evaluate import Evaluator
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.strength.core import (
    Bounds,
    SweepRow,
    curve,
    largest_within,
    span,
    sweep_row,
    window,
    windows,
)


def row(
    m: float,
    score: float = 1.0,
    coherence: float = 1.0,
    p95: float = 0.1,
    spill_p95: float | None = None,
) -> SweepRow:
    given = {"score": score, "coherence": coherence, "damage_p95": p95, "spill_p95": spill_p95}
    bare = {field.name: 0 for field in fields(SweepRow)}
    return SweepRow(**{**bare, "strength": m, **given})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def test_bounds_name_what_breaks_them() -> None:
    bounds = Bounds(budget=0.5, coherence=0.9, target=0.9, spill=0.2)
    assert bounds.failing(row(1, 0.0)) == "" and not bounds.kept(row(1, 0.0))
    assert bounds.failing(row(1, coherence=0.8, p95=0.6)) == "coherence"
    assert bounds.failing(row(1, p95=0.6, spill_p95=0.3)) == "damage"
    assert bounds.failing(row(1, spill_p95=0.3)) == "spill"
    assert Bounds().failing(row(1, spill_p95=0.3)) == "" and bounds.kept(row(1, 0.9, 0.9, 0.5, 0.2))


def test_window_is_the_run_around_a_strength() -> None:
    scores = {0.0: 1.0, 1.0: 1.0, 2.0: 1.0, 3.0: 1.0, 4.0: 0.5, 5.0: 1.0, 6.0: 1.0, 7.0: 0.2}
    rows = [row(m, score) for m, score in scores.items()]
    assert windows(rows, Bounds()) == [(1.0, 3.0), (5.0, 6.0)]  # 0 is no steering
    assert windows(rows[::-1], Bounds()) == [(1.0, 3.0), (5.0, 6.0)]
    assert window(rows, Bounds(), 0.0) is None and window(rows, Bounds(), 4.0) is None
    assert window(rows, Bounds(), 0.0, elsewhere=True) == (1.0, 3.0)  # the widest
    for elsewhere in (True, False):
        assert window(rows, Bounds(), 5.5, elsewhere=elsewhere) == (5.0, 6.0)
        assert window(rows, Bounds(target=0.1), 1.0, elsewhere=elsewhere) == (1.0, 7.0)
    assert window([row(1.0, 0.5)], Bounds(), 1.0, elsewhere=True) is None
    broken = [row(1.0, p95=0.6), row(2.0, coherence=0.8)]
    assert window(broken, Bounds(), 1.0, elsewhere=True) is None
    away = [row(-m, score) for m, score in scores.items()]
    assert window(away, Bounds(), -2.0) == (-3.0, -1.0)
    assert span((-3.0, -1.25)) == "-3 to -1.25"


@pytest.mark.parametrize("edge", [1e-3, 0.3, 1.0, 7.0])
@pytest.mark.parametrize(("width", "points"), [(1.05, 3), (1.2, 5), (1.01, 1)])
def test_the_edge_is_narrowed_down(edge: float, width: float, points: int) -> None:
    asked: list[float] = []

    def square(magnitudes: Sequence[float]) -> list[float]:
        asked.extend(magnitudes)
        return [m * m for m in magnitudes]

    within, beyond = largest_within(square, edge**2, width=width, points=points)
    assert within <= edge < beyond <= width * within and {within, beyond} <= set(asked)


def test_what_was_measured_before_is_not_measured_again() -> None:
    asked: list[float] = []

    def linear(magnitudes: Sequence[float]) -> list[float]:
        asked.extend(magnitudes)
        return list(magnitudes)

    known = {2.0: 2.0, 4.0: 4.0, 8.0: 8.0}
    within, beyond = largest_within(linear, 5.0, known=known)
    assert within <= 5.0 < beyond <= 1.05 * within and all(4 < m < 8 for m in asked)
    asked.clear()
    assert largest_within(linear, 10.0, known=known, largest=9.0) == (9.0, math.inf)
    assert asked == [9.0]
    asked.clear()
    assert largest_within(linear, 0.1, known=known, smallest=0.5) == (0.0, 0.5)
    assert asked == [1.0, 0.5]


def test_a_curve_is_the_evaluations_in_rows(lm: LanguageModel) -> None:
    evaluator = Evaluator(lm, planted.behavior(), max_new_tokens=planted.TOKENS)
    push = planted.push(lm)
    strengths = [1.0, 0.3]
    found = curve(evaluator, push, strengths, 1, seed=3, samples=True)
    results = evaluator.run_many(push, strengths, 1)
    assert found == [sweep_row(push.at(m), r, 3) for m, r in zip(strengths, results, strict=True)]
    bare = curve(evaluator, push, strengths, 1, seed=3)
    assert [r.samples for r in bare] == [(), ()] and found[0].samples
    assert [r.scores for r in bare] == [r.scores for r in found]


def test_the_first_prompts_are_a_smaller_evaluator(lm: LanguageModel) -> None:
    behavior, push = planted.behavior(), planted.push(lm).at(1.0)
    whole = Evaluator(lm, behavior, max_new_tokens=planted.TOKENS, max_prompts=6)
    few, alone = (
        whole.first(2),
        Evaluator(lm, behavior, max_new_tokens=planted.TOKENS, max_prompts=2),
    )
    mine, theirs = few.run(push, 1), alone.run(push, 1)
    assert (mine.scores, mine.samples) == (theirs.scores, theirs.samples) and len(mine.scores) == 2
    assert mine.damage(0) == theirs.damage(0)
    assert whole.first(2) is few and whole.first(6) is whole.first(9) is whole
    assert few.known is whole.known and len(whole.run(None, 1).scores) == 6
    with counting(lm) as calls:
        few.unsteered("away")
    assert calls.rows == 0  # answered before
