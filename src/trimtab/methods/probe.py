"""The normal of a linear probe that tells the sides apart: L2 logistic regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.methods.contrast import read_contrast
from trimtab.methods.registry import Found, Task, register


@register("probe")
def probe(task: Task, *, l2: float = 1.0, max_iterations: int = 200) -> Found:
    """Find the weights of a logistic regression (toward = 1) at each layer, in the raw space.

    Source: linear probes; as a steering direction in Li et al., 2023 (inference-time intervention).

    Args:
        task: what to find it from.
        l2: weight of the penalty, in units of the summed log loss (scikit-learn's 1/C).
        max_iterations: of the solver.
    """
    if not (math.isfinite(l2) and l2 > 0) or max_iterations < 1:
        raise TrimtabError(
            f"a probe with l2={l2}, max_iterations={max_iterations}",
            "a penalty or a count that is not positive",
            "use l2=1.0 and max_iterations=200, or near them",
        )
    contrast = read_contrast(task)
    vectors: dict[int, Tensor] = {}
    accuracy: dict[str, float] = {}  # JSON keys are text
    for layer in contrast.telling:
        toward, away = contrast.toward[layer], contrast.away[layer]
        weights, bias = fit(toward, away, l2, max_iterations)
        right = (toward @ weights + bias > 0).sum() + (away @ weights + bias < 0).sum()
        vectors[layer] = weights
        accuracy[str(layer)] = float(right) / (len(toward) + len(away))
    return contrast.found(vectors, {"train_accuracy": accuracy})


def fit(
    toward: Tensor, away: Tensor, l2: float = 1.0, max_iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Fit sum log(1 + exp(-y (w.z + b))) + l2/2 |w|^2 on standardized features z.

    The solution lies in the span of the rows, so it is found in their singular basis: as exact, and
    small when there are fewer prompts than dimensions.

    Args:
        toward: `[n_toward, d]` float64, labels y = +1.
        away: `[n_away, d]` float64, labels y = -1.
        l2: weight of the penalty.
        max_iterations: of L-BFGS with a strong Wolfe line search.

    Returns:
        Weights `[d]` and bias for the RAW features: the score is `x @ weights + bias`.
    """
    rows = torch.cat([toward, away]).double()
    labels = torch.cat([torch.ones(len(toward)), -torch.ones(len(away))]).double()
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    # A feature that does not vary says nothing; dividing by its rounding noise would say a lot.
    varies = deviation > 1e-6 * rows.abs().mean(0).clamp(min=1e-12)
    scale = torch.where(varies, deviation, torch.ones_like(deviation))
    z = torch.where(varies, (rows - mean) / scale, torch.zeros_like(rows))
    left, singular, right = torch.linalg.svd(z, full_matrices=False)
    coordinates = left * singular
    parameters = torch.zeros(len(singular) + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        weights, bias = parameters[:-1], parameters[-1]
        margins = labels * (coordinates @ weights + bias)
        value = torch.nn.functional.softplus(-margins).sum() + 0.5 * l2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    solution = parameters.detach()
    weights = (right.T @ solution[:-1]) / scale
    return weights, solution[-1] - weights @ mean
