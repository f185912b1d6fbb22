"""Rank correlation: do two figures order things alike?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError


def spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float:
    """Return Spearman's rank correlation in [-1, 1], ties at their mean rank; nan if one is constant.

    Raises:
        TrimtabError: when the two differ in length, have fewer than two values, or one that is nan.
    """
    a = torch.as_tensor(first, dtype=torch.float64).flatten()
    b = torch.as_tensor(second, dtype=torch.float64).flatten()
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
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return float(((x * y).sum() / size).clamp(-1, 1)) if size > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[places]
