"""Intervals: exact binomial for rates, bootstrap over prompts for everything else. Rank correlation.

Clopper and Pearson (1934) for 0/1 values; for graded values the percentile bootstrap, widened for
small samples as in Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section
4.1.4: the percentile levels become Phi(-sqrt(n / (n - 1)) * t), with t the Student quantile at n -
1 degrees of freedom.

A bootstrap of n identical values v has no width, which claims too much. If a share q of all prompts
differed from v, n equal draws would have probability (1 - q)^n, so q is below
q_u = 1 - (tail probability)^(1/n), and for values in [a, b] the mean lies between v - q_u (v - a)
and v + q_u (b - v). For v = 0 or 1 this is the Clopper-Pearson interval again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from scipy.special import betaincinv, stdtrit

from trimtab.errors import TrimtabError
from trimtab.results.tables import with_interval

RESAMPLES = 2000
TAIL = 0.025  # on either side of a 95 % interval


class Interval(NamedTuple):
    """A figure between the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def cell(self) -> str:
        """The figure with its interval, for a table."""
        return with_interval(*self)


def clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """Return the exact binomial interval of a rate, its coverage at least 95 % at every rate."""
    assert 0 <= successes <= n and n > 0, f"{successes} successes in {n} trials"
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, TAIL))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - TAIL))
    return low, high


def bootstrap(values: Sequence[float] | torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return a bootstrap interval of the mean of `values`, one value per prompt.

    One value says nothing about spread: its interval is (-inf, inf).

    Raises:
        TrimtabError: when there are no values, or some are not finite.
    """
    sample = _checked(values)
    return ratio_bootstrap(sample, torch.ones_like(sample), seed)


def paired_bootstrap(
    first: Sequence[float] | torch.Tensor,
    second: Sequence[float] | torch.Tensor,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval of mean(first - second), shares of which value i has the same prompt."""
    a, b = _checked(first), _checked(second)
    if a.shape != b.shape:
        raise TrimtabError(
            asked="a paired comparison",
            found=f"{a.shape[0]} values against {b.shape[0]}",
            advice="compare levers that answered the same prompts",
        )
    return bounded_interval(a - b, -1.0, 1.0, seed)


def ratio_bootstrap(
    sums: Sequence[float] | torch.Tensor, counts: Sequence[float] | torch.Tensor, seed: int = 0
) -> tuple[float, float]:
    """Return an interval of sum(sums) / sum(counts), whole prompts resampled.

    For per-token figures: tokens of one answer are not independent, so prompts are drawn, not
    tokens.
    """
    numerator, denominator = _checked(sums), _checked(counts)
    n = numerator.shape[0]
    if n == 1:
        return -math.inf, math.inf
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, n, (RESAMPLES, n), generator=generator)
    totals = denominator[picks].sum(dim=1)
    ratios = numerator[picks].sum(dim=1)[totals > 0] / totals[totals > 0]
    return percentiles(ratios, n)


def two_way_bootstrap(grid: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return an interval of the mean of `grid` [repeats, prompts], resampling both axes.

    For nulls: other random directions and other prompts could both have been drawn (the pigeonhole
    bootstrap, Owen 2007). The widening uses the number of prompts.
    """
    repeats, n = grid.shape
    values = _checked(grid.flatten()).reshape(repeats, n)
    if n == 1 or bool((values == values[0, 0]).all()):
        return _identical(values.mean().item(), n, 0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    for i in range(RESAMPLES):
        rows = torch.randint(0, repeats, (repeats,), generator=generator)
        columns = torch.randint(0, n, (n,), generator=generator)
        means[i] = values[rows][:, columns].mean()
    return _clip(percentiles(means, n), 0.0, 1.0)


def share_interval(values: Sequence[float] | torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the interval of a mean of shares in [0, 1]: exact if all are 0 or 1, else bootstrap."""
    sample = _checked(values)
    assert bool(((sample >= 0) & (sample <= 1)).all()), "judges return numbers from 0 to 1"
    if bool(((sample == 0) | (sample == 1)).all()):
        return clopper_pearson(int(sample.sum()), sample.shape[0])
    return bounded_interval(sample, 0.0, 1.0, seed)


def bounded_interval(
    sample: torch.Tensor, least: float, most: float, seed: int = 0
) -> tuple[float, float]:
    """Return a bootstrap interval of the mean of values in [least, most], never of zero width."""
    if bool((sample == sample[0]).all()):
        return _identical(sample[0].item(), sample.shape[0], least, most)
    return _clip(bootstrap(sample, seed), least, most)


def percentiles(means: torch.Tensor, n: int) -> tuple[float, float]:
    """Read an interval from resampled means, levels widened for n prompts (module docstring)."""
    student = float(stdtrit(n - 1, 1 - TAIL))
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student)
    bounds = torch.quantile(means.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return bounds[0].item(), bounds[1].item()


def spearman(
    first: Sequence[float] | torch.Tensor, second: Sequence[float] | torch.Tensor
) -> float:
    """Return Spearman's rank correlation in [-1, 1], ties at their mean rank; nan if one is constant.

    Raises:
        TrimtabError: when the two differ in length, have fewer than two values, or one that is nan.
    """
    from scipy.stats import spearmanr  # takes a second to import, so not before it is used

    a, b = (torch.as_tensor(x, dtype=torch.float64).flatten().cpu() for x in (first, second))
    if a.shape != b.shape or a.numel() < 2:
        raise TrimtabError(
            asked="a rank correlation",
            found=f"{a.numel()} values against {b.numel()}",
            advice="give two figures for each of at least two things",
        )
    if bool(a.isnan().any() | b.isnan().any()):
        raise TrimtabError(
            asked="a rank correlation",
            found="a value that is nan",
            advice="leave out what was not measured",
        )
    if bool((a == a[0]).all() or (b == b[0]).all()):
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)  # pyright: ignore


def _identical(value: float, n: int, least: float, most: float) -> tuple[float, float]:
    differing = 1 - TAIL ** (1 / n)
    return value - differing * (value - least), value + differing * (most - value)


def _clip(bounds: tuple[float, float], least: float, most: float) -> tuple[float, float]:
    return max(bounds[0], least), min(bounds[1], most)


def _checked(values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    sample = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if sample.numel() == 0 or not bool(torch.isfinite(sample).all()):
        raise TrimtabError(
            asked="an interval over prompts",
            found="no values" if sample.numel() == 0 else "a value that is not finite",
            advice="measure at least one prompt, and look at the row that gave NaN or infinity",
        )
    return sample
