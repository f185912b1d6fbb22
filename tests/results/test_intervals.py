"""Intervals against closed forms and by simulated coverage."""

import math
from statistics import NormalDist

import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.results.intervals import (
    bootstrap,
    clopper_pearson,
    paired_bootstrap,
    percentiles,
    ratio_bootstrap,
    share_interval,
    two_way_bootstrap,
)


def binomial_at_least(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("k", "n"), [(1, 10), (7, 10), (19, 24), (23, 24), (3, 200), (500, 1000)])
def test_clopper_pearson_solves_its_defining_tail_equations(k: int, n: int) -> None:
    low, high = clopper_pearson(k, n)
    assert binomial_at_least(k, n, low) == pytest.approx(0.025, abs=1e-9)
    assert 1 - binomial_at_least(k + 1, n, high) == pytest.approx(0.025, abs=1e-9)


def test_clopper_pearson_at_the_ends_is_the_rule_of_the_nth_root() -> None:
    assert clopper_pearson(0, 24) == pytest.approx((0.0, 1 - 0.025 ** (1 / 24)))
    assert clopper_pearson(24, 24) == pytest.approx((0.025 ** (1 / 24), 1.0))


def test_clopper_pearson_covers_at_least_its_level_at_every_rate() -> None:
    n = 15
    intervals = [clopper_pearson(k, n) for k in range(n + 1)]
    coverages = []
    for p in torch.linspace(0.01, 0.99, 99).tolist():
        mass = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverages.append(
            sum(m for m, (low, high) in zip(mass, intervals, strict=True) if low <= p <= high)
        )
    assert min(coverages) >= 0.95
    assert min(coverages) < 0.97  # not wider than it needs to be


@pytest.mark.parametrize(("freedom", "expected"), [(2, 4.30265), (7, 2.36462), (23, 2.06866)])
def test_percentile_levels_use_the_printed_table_of_student(freedom: int, expected: float) -> None:
    means = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    low, high = percentiles(means, freedom + 1)
    # A hundredth-thousandth of t, as the table is printed, moves the level by less than 1e-6.
    level = NormalDist().cdf(-math.sqrt((freedom + 1) / freedom) * expected)
    assert (low, high) == pytest.approx((level, 1 - level), abs=1e-6)


def test_bootstrap_matches_the_normal_interval_on_a_large_sample() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap(values, seed=0)
    half = 1.96 * values.std().item() / math.sqrt(4000)
    assert low == pytest.approx(values.mean().item() - half, abs=half * 0.12)
    assert high == pytest.approx(values.mean().item() + half, abs=half * 0.12)


def test_bootstrap_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    values = [0.1, 0.9, 0.4, 0.7, 0.35, 0.62, 0.77, 0.03]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("n", "least"), [(6, 0.88), (12, 0.92), (24, 0.93)])
def test_bootstrap_covers_the_mean_of_small_skewed_samples(n: int, least: float) -> None:
    # in 1,500 rounds: 0.916, 0.943 and 0.951, where plain percentiles reach 0.855, 0.911 and 0.938
    generator = torch.Generator().manual_seed(7)
    rounds, hits = 400, 0
    for i in range(rounds):
        values = torch.rand(n, generator=generator, dtype=torch.float64) ** 2
        low, high = bootstrap(values, seed=i)
        hits += low <= 1 / 3 <= high
    assert least < hits / rounds < 0.985


def test_percentile_levels_widen_for_small_samples_as_published() -> None:
    means = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    low, high = percentiles(means, 6)  # Phi(-sqrt(6/5) * 2.570582)
    assert (low, high) == pytest.approx((0.002431, 1 - 0.002431), abs=2e-6)
    low, high = percentiles(means, 100_000)
    assert (low, high) == pytest.approx((0.025, 0.975), abs=2e-5)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    generator = torch.Generator().manual_seed(5)
    hard = torch.rand(30, generator=generator, dtype=torch.float64)
    other = hard - 0.05 + 0.01 * torch.rand(30, generator=generator, dtype=torch.float64)
    low, high = paired_bootstrap(hard, other)
    assert 0 < low < 0.045 < high < 0.06
    first, second = bootstrap(hard), bootstrap(other)
    assert first[0] < second[1]  # unpaired, the two intervals overlap


def test_pairing_refuses_unequal_lengths() -> None:
    with pytest.raises(TrimtabError, match="3 values against 2"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0])


def test_ratio_bootstrap_weighs_prompts_by_their_tokens() -> None:
    low, high = ratio_bootstrap([2.0] * 20, [4] * 20)
    assert (low, high) == pytest.approx((0.5, 0.5))
    low, high = ratio_bootstrap([1.0, 100.0] * 20, [1, 50] * 20)
    assert low < 101 / 51 < high < 2.0 + 1e-9


def test_two_way_bootstrap_is_wider_when_directions_disagree() -> None:
    agree = torch.tensor([[1.0, 0.0, 1.0, 0.0] * 6] * 3)
    disagree = torch.stack([torch.zeros(24), torch.ones(24), torch.full((24,), 0.5)])
    narrow, wide = two_way_bootstrap(agree), two_way_bootstrap(disagree)
    assert narrow[0] < 0.5 < narrow[1] and wide[0] < 0.5 < wide[1]
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_no_interval_of_shares_has_zero_width() -> None:
    assert two_way_bootstrap(torch.zeros(3, 24)) == pytest.approx(clopper_pearson(0, 24))
    assert share_interval([1.0] * 12) == pytest.approx(clopper_pearson(12, 12))
    most = 1 - 0.025 ** (1 / 12)  # share of prompts that may differ from the 12 seen
    assert share_interval([0.5] * 12) == pytest.approx((0.5 - most / 2, 0.5 + most / 2))
    assert paired_bootstrap([1.0] * 12, [0.0] * 12) == pytest.approx((1 - 2 * most, 1.0))
    assert paired_bootstrap([1.0] * 12, [1.0] * 12) == pytest.approx((-most, most))


def test_share_interval_is_exact_for_rates_and_a_bootstrap_for_grades() -> None:
    assert share_interval([1, 0, 1, 1]) == clopper_pearson(3, 4)
    grades = [0.9, 0.95, 1.0, 0.99, 0.2]
    low, high = share_interval(grades, seed=1)
    expected = bootstrap(grades, seed=1)
    assert (low, high) == (max(expected[0], 0.0), min(expected[1], 1.0))


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1.0]])
def test_intervals_of_nothing_or_nan_are_refused(values: list[float]) -> None:
    with pytest.raises(TrimtabError):
        bootstrap(values)


def test_one_value_has_no_spread_to_speak_of() -> None:
    assert bootstrap([0.4]) == (-math.inf, math.inf)
    assert share_interval([1.0]) == pytest.approx((0.025, 1.0))


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(AssertionError):
        clopper_pearson(k, n)


def test_values_outside_the_unit_interval_are_not_shares() -> None:
    with pytest.raises(AssertionError, match="0 to 1"):
        share_interval([0.5, 1.5])
