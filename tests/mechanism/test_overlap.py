"""Shared dimensions, against exact combinatorics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.overlap import dimension_overlap
from trimtab.errors import TrimtabError


def marked(width: int, *dims: int) -> torch.Tensor:
    scores = torch.zeros(width)
    scores[list(dims)] = 1.0
    return scores


def tail(width: int, first: int, second: int, shared: int) -> float:
    """P(at least `shared` in common) of two random sets: the hypergeometric distribution."""
    ways = range(shared, min(first, second) + 1)
    counts = [math.comb(first, k) * math.comb(width - first, second - k) for k in ways]
    return sum(counts) / math.comb(width, second)


def test_the_test_is_the_hypergeometric_one() -> None:
    a, b = marked(20, 0, 1, 2, 3), marked(20, 2, 3, 4, 5)
    found = dimension_overlap({"a": {0: a}, "b": {0: b}}, share=0.2, permutations=20_000)
    (pair,) = found
    assert pair.iou == pytest.approx(2 / 6)
    assert pair.p == pytest.approx(tail(20, 4, 4, 2), abs=0.01)
    assert pair.expected < pair.iou <= pair.high or pair.p < 0.2


def test_same_and_disjoint_sets() -> None:
    a, b = marked(40, *range(8)), marked(40, *range(8, 16))
    found = dimension_overlap({"a": {1: a}, "same": {1: a}, "b": {1: b}}, 0.2, permutations=999)
    same, one, other = found
    assert same.iou == 1.0 and same.p == pytest.approx(1 / 1000)
    assert one.iou == other.iou == 0.0 and one.p == 1.0


def test_how_many_survive_in_a_layer_is_no_evidence() -> None:
    """Both sets fill layer 0; permuting across layers would call that an overlap."""
    full = {0: marked(10, *range(10)), 1: torch.zeros(10)}
    (pair,) = dimension_overlap({"a": full, "b": full}, share=0.5, permutations=500)
    assert pair.iou == 1.0 and pair.p == 1.0 and pair.expected == 1.0


def test_refusals() -> None:
    a = torch.rand(8)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"a": {0: a}}, {}),
        ({"a": {0: a}, "b": {1: a}}, {}),
        ({"a": {0: a}, "b": {0: torch.rand(9)}}, {}),
        ({"a": {0: a}, "b": {0: a}}, {"permutations": 0}),
        ({"a": {0: a}, "b": {0: a}}, {"share": 0.0}),
    ]
    for scores, options in cases:
        with pytest.raises(TrimtabError):
            dimension_overlap(scores, **options)
