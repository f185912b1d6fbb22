"""spearman(): against ranks worked out by hand."""

import math

import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.results.intervals import spearman


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, -100], -1.0),
        # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
        ([1, 5, 5, 9], [0, 1, 2, 3], 4.5 / math.sqrt(4.5 * 5)),
        # Ranks 2, 2, 2, 4 against 1.5, 3, 1.5, 4: (0.5 - 0.25 + 0.5 + 2.25) / sqrt(3 * 4.5).
        ([7, 7, 7, 8], [1, 2, 1, 3], 3.0 / math.sqrt(3 * 4.5)),
    ],
)
def test_it_equals_the_hand_made_value(
    first: list[float], second: list[float], expected: float
) -> None:
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12)
    assert spearman(second, first) == pytest.approx(expected, abs=1e-12)


def test_infinities_have_a_rank() -> None:
    assert spearman([1.0, 2.0, math.inf], [5.0, 6.0, 7.0]) == pytest.approx(1.0)


def test_only_the_order_counts() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    other = torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert spearman(values, other) == pytest.approx(spearman(values.exp(), 3 * other - 2))
    assert abs(spearman(values, other)) < 0.5


def test_a_constant_has_no_correlation() -> None:
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(spearman([1.0, 2.0], [3.0, 3.0]))


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([], []), ([1.0, 2.0], [1.0])])
def test_too_few_or_unequal_values_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(TrimtabError, match="rank correlation"):
        spearman(first, second)


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(TrimtabError, match="nan"):
        spearman([1.0, math.nan, 3.0], [1.0, 2.0, 3.0])
