"""The main direction of the differences between the sides, by a singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.methods.contrast import read_contrast
from trimtab.methods.registry import Found, Task, register


@register("pca")
def pca(task: Task) -> Found:
    """Find the first right singular vector of the UNCenterD differences at each layer.

    Paired: rows toward_i - away_i. Unpaired: rows toward_i - mean(away) and mean(toward) - away_j.
    Centering, the default of PCA routines, would remove the mean difference and leave the main
    direction of disagreement. The sign is that of the mean difference.

    Source: the reading vectors of representation engineering (Zou et al., 2023).
    """
    contrast = read_contrast(task)
    vectors: dict[int, Tensor] = {}
    explained: dict[str, float] = {}  # JSON keys are text
    for layer in contrast.telling:
        vectors[layer], explained[str(layer)] = main_direction(
            contrast.toward[layer], contrast.away[layer], contrast.paired
        )
    return contrast.found(vectors, {"explained": explained})


def main_direction(toward: Tensor, away: Tensor, paired: bool) -> tuple[Tensor, float]:
    """Return the unit direction `[d]` of the differences, and its share of their squared length.

    The sides are `[n_toward, d]` and `[n_away, d]`, with as many rows when paired.
    """
    mean_difference = toward.mean(0) - away.mean(0)
    if paired:
        rows = toward - away
    else:
        rows = torch.cat([toward - away.mean(0), toward.mean(0) - away])
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    sign = 1.0 if float(right[0] @ mean_difference) >= 0 else -1.0
    return right[0] * sign, float(singular[0].square() / singular.square().sum())
