"""One value per prompt in short: its mean, or its quantiles, with intervals.

Quantiles allow infinities: "not reached" is a value like any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.results.intervals import TAIL, bootstrap, share_interval
from trimtab.results.tables import with_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with its 95 % bootstrap interval; infinite for a single prompt."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Tensor, seed: int = 0) -> Estimate:
        """Return the estimate of `[n]` values, one per prompt; nan everywhere where one is not finite."""
        values = torch.as_tensor(values).detach().double().cpu()
        if not values.numel() or not bool(values.isfinite().all()):
            return Estimate(*(float("nan"),) * 3)
        return Estimate(float(values.mean()), *bootstrap(values, seed))

    @staticmethod
    def share(values: Tensor, seed: int = 0) -> Estimate:
        """Return the estimate of a share of `[n]` values that are true; exact binomial interval."""
        sample = torch.as_tensor(values).double().cpu()
        return Estimate(float(sample.mean()), *share_interval(sample, seed))

    @property
    def cell(self) -> str:
        """The mean with its interval, for a table."""
        return with_interval(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Quantiles:
    """How one value per prompt is distributed.

    Attributes:
        n: prompts.
        mean: over prompts, with a bootstrap interval `low` to `high`; nan beside an infinity.
        low: see `mean`.
        high: see `mean`.
        p5: 5th percentile, interpolated as the other ones.
        p25: lower quartile.
        median: with `median_low` to `median_high`, the order statistics that enclose the median
            with a probability of at least 95 % whatever the distribution; infinite below six prompts.
        median_low: see `median`.
        median_high: see `median`.
        p75: upper quartile.
        p95: 95th percentile.
    """

    n: int
    mean: float
    low: float
    high: float
    p5: float
    p25: float
    median: float
    median_low: float
    median_high: float
    p75: float
    p95: float

    @property
    def cell(self) -> str:
        """The median with its interval, for a table."""
        return with_interval(self.median, self.median_low, self.median_high)


def quantiles(values: Tensor, seed: int = 0) -> Quantiles:
    """Summarize `[n]` values, one per prompt; nan everywhere for none."""
    ordered = values.detach().double().cpu().sort().values
    n = ordered.numel()
    if not n:
        return Quantiles(0, *(math.nan,) * 10)
    mean, low, high = math.nan, math.nan, math.nan
    if bool(ordered.isfinite().all()):
        mean = float(ordered.mean())
        low, high = bootstrap(ordered, seed)
    p5, p25, median, p75, p95 = (quantile(ordered, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    median_low, median_high = median_interval(ordered)
    return Quantiles(n, mean, low, high, p5, p25, median, median_low, median_high, p75, p95)


def median_interval(ordered: Tensor) -> tuple[float, float]:
    """Return the order statistics of sorted `[n]` values that enclose the median, at least 95 %.

    The number of values below the median is binomial with one half, whatever the distribution: the
    k-th value from either end is outside it with probability P(Bin(n, 1/2) < k).
    """
    n = ordered.numel()
    k, below = 0, 0.0
    while below + math.comb(n, k) / 2**n <= TAIL:
        below += math.comb(n, k) / 2**n
        k += 1
    if not k:
        return -math.inf, math.inf
    return float(ordered[k - 1]), float(ordered[n - k])


def quantile(ordered: Tensor, share: float) -> float:
    """Return a quantile of sorted `[n]` values, interpolated; infinities are allowed."""
    place = share * (ordered.numel() - 1)
    low = ordered[math.floor(place)]
    high = ordered[math.ceil(place)]
    # Two equal infinities have no difference to interpolate.
    return float(low if low == high else low + (high - low) * (place - math.floor(place)))
