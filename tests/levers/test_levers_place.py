"""Placing: the largest strength within a budget, on curves that are known."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

import planted
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.steering.together import Together
from trimtab.strength.core import WIDTH
from trimtab.strength.place import longest, place


class Curve:
    """Stands for a reference whose damage is a known function of strength, and for the lever."""

    strength = 1.0

    def __init__(self, damage):
        self.damage = damage

    def at(self, m):
        return m

    def kl(self, m):
        return [torch.tensor([self.damage(m)], dtype=torch.float64)]


def placed(damage, budget, **more):
    return place(cast(Any, Curve(damage)), cast(Any, Curve(damage)), budget, **more)


def square(m):
    return m * m


@pytest.mark.parametrize("first", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("budget", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_finds_the_crossing_from_anywhere(first, budget, sign):
    found = placed(square, budget, first=first, sign=sign)
    assert found.limited_by == "budget"
    assert found.damage_p95 <= budget
    assert math.sqrt(budget) / WIDTH <= sign * found.strength <= math.sqrt(budget)
    assert dict(found.tried)[found.strength] == found.damage_p95


def test_stops_at_the_range_where_damage_saturates():
    found = placed(lambda m: min(m, 0.2), 0.5, first=1.0, largest=10.0)
    assert (found.strength, found.limited_by) == (10.0, "range")
    assert placed(square, 0.5, first=3.0, largest=0.1).strength == 0.1


def test_takes_the_end_of_the_first_run():
    """Beyond 2 damage falls again; what lies behind the rise is not reached."""
    found = placed(lambda m: 0.0 if m > 3 else m, 1.0, first=0.25, largest=100)
    assert 1 / WIDTH <= found.strength <= 1


def test_zero_when_nothing_keeps_the_budget():
    found = placed(lambda m: 1.0, 0.5)
    assert found.strength == 0 and found.damage_p95 == 0


def test_vector_and_lever_agree_on_a_model():
    lm, behavior = planted.language_model(), planted.behavior()
    vector = planted.push(lm, scope="all")
    prompts = [e.prompt for e in behavior.toward][:3]
    answers = lm.generate(prompts, max_new_tokens=4)
    reference = Reference(lm, prompts, answers)
    shared = place(reference, vector, 0.4)
    single = place(reference, Together((vector,)), 0.4, largest=longest(vector))
    assert shared.strength == pytest.approx(single.strength, rel=WIDTH - 1)
    measured = summarize(reference.kl(vector.at(shared.strength))).p95
    assert measured == pytest.approx(shared.damage_p95, rel=1e-3) and measured <= 0.4
    beyond = summarize(reference.kl(vector.at(shared.strength * WIDTH * 1.01))).p95
    assert beyond > 0.4
