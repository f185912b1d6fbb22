"""A mean over prompts with its interval: the form of every figure of the geometry report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.results.intervals import bootstrap, share_interval
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
