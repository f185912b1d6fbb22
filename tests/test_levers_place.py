"""Placing: the largest strength within a budget, on curves that are known."""

from __future__ import annotations

import math

import pytest

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.strength.core import WIDTH
from trimtab.strength.place import longest, place, place_lever, place_vector


def square(strengths):
    return [m * m for m in strengths]


@pytest.mark.parametrize("first", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("budget", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_finds_the_crossing_from_anywhere(first, budget, sign):
    found = place(square, budget, first=first, sign=sign)
    assert found.limited_by == "budget"
    assert found.damage_p95 <= budget
    assert math.sqrt(budget) / WIDTH <= sign * found.strength <= math.sqrt(budget)
    assert dict(found.tried)[found.strength] == found.damage_p95


def test_stops_at_the_range_where_damage_saturates():
    found = place(lambda ms: [min(m, 0.2) for m in ms], 0.5, first=1.0, largest=10.0)
    assert (found.strength, found.limited_by) == (10.0, "range")
    assert place(square, 0.5, first=3.0, largest=0.1).strength == 0.1


def test_takes_the_end_of_the_first_run():
    """Beyond 2 damage falls again; what lies behind the rise is not reached."""
    found = place(lambda ms: [0.0 if m > 3 else m for m in ms], 1.0, first=0.25, largest=100)
    assert 1 / WIDTH <= found.strength <= 1


def test_zero_when_nothing_keeps_the_budget():
    found = place(lambda ms: [1.0 for _ in ms], 0.5)
    assert found.strength == 0 and found.damage_p95 == 0


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_budgets_are_above_zero(budget):
    with pytest.raises(TrimtabError, match="not above 0"):
        place(square, budget)


def test_vector_and_lever_agree_on_a_model():
    lm, behavior = planted.language_model(), planted.behavior()
    vector = planted.push(lm, scope="all")
    prompts = [e.prompt for e in behavior.toward][:3]
    answers = lm.generate(prompts, max_new_tokens=4)
    reference = Reference(lm, prompts, answers)
    shared = place_vector(reference, vector, 0.4)
    single = place_lever(reference, vector.at, 0.4, largest=longest(vector))
    assert shared.strength == pytest.approx(single.strength, rel=WIDTH - 1)
    measured = summarize(reference.kl(vector.at(shared.strength))).p95
    assert measured == pytest.approx(shared.damage_p95, rel=1e-3) and measured <= 0.4
    beyond = summarize(reference.kl(vector.at(shared.strength * WIDTH * 1.01))).p95
    assert beyond > 0.4
