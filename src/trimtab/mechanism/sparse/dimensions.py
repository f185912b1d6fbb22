"""How much each dimension of a vector carries, and which of them are kept.

The steered stream is h + a s at strength share a. Over fixed tokens (teacher_forced.py)

    IE_i = s_i (1/T) sum_t  d m / d h_i  at share (t + 1/2) / T,   the midpoint rule, T = 10

with d m / d h summed over the steered positions, so that the sum of all IE_i is m(steered) - m(base)
up to the midpoint rule: each dimension gets its part of the whole effect. r_i = IE_i / s_i is the mean
slope of the metric along dimension i. Source: section 5 of arXiv 2604.08524; integrated gradients are
Sundararajan et al., 2017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.mechanism.case import check_adds
from trimtab.mechanism.circuits.teacher_forced import TokenRuns
from trimtab.models.gradients import frozen
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.results import Progress
from trimtab.steering.hooks import Edit, steered
from trimtab.steering.vector import VectorSteering

Effects = Mapping[int, Tensor]  # layer -> `[d_model]`
STEPS = 10
ORDERS = ("attribution", "slope", "magnitude", "random", "bottom")


def dimension_effects(
    lm: LanguageModel,
    runs: Sequence[TokenRuns],
    steps: int = STEPS,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Return the integrated gradient effect of every dimension of the steering that made the runs.

    Active layer -> mean over samples of IE, float32 `[d_model]` on the CPU, in logits: positive where
    the dimension helps what the steering of its run does, whichever way that is. Every sample counts
    alike, whichever set it is in. Each of the T steps is a pass forward and back.
    """
    total = {layer: torch.zeros(lm.d_model) for layer in runs[0].vector.layers}
    work = [(run, *part) for run in runs for part in run.batches(lm)]
    for done, (run, batch, targets) in enumerate(work):
        moved = changes(run.vector)
        for step in range(steps):
            share = (step + 0.5) / steps
            leaves = {
                layer: (share * s).to(lm.device).requires_grad_() for layer, s in moved.items()
            }
            edits = [
                Edit(Site(run.vector.site, layer), "add", leaf, 1.0, scope=run.vector.scope)
                for layer, leaf in leaves.items()
            ]
            with frozen(lm.model), steered(lm, edits):
                m = targets.metric(lm.forward(batch, logits_to_keep=targets.keep)).sum()
                slopes = torch.autograd.grad(m, list(leaves.values()))
            for layer, slope in zip(leaves, slopes, strict=True):
                total[layer] += moved[layer] * slope.detach().float().cpu() / steps
            if progress is not None:
                progress(done * steps + step + 1, len(work) * steps)
    samples = sum(len(run.encoded) for run in runs)
    return {layer: effect / samples for layer, effect in total.items()}


@torch.no_grad()
def whole_effect(lm: LanguageModel, runs: Sequence[TokenRuns]) -> float:
    """Return m(steered) - m(base), the mean over samples of all sets: what the effects divide up."""
    total = 0.0
    for run in runs:
        for batch, targets in run.batches(lm):
            total -= float(targets.metric(lm.forward(batch, logits_to_keep=targets.keep)).sum())
            with run.vector.on(lm):
                total += float(targets.metric(lm.forward(batch, logits_to_keep=targets.keep)).sum())
    return total / sum(len(run.encoded) for run in runs)


def changes(vector: VectorSteering) -> dict[int, Tensor]:
    """Return active layer -> what is added to the stream, float32 `[d_model]`."""
    check_adds(vector)
    return {layer: a * vector.directions[layer] for layer, a in vector.alphas.items()}


def dimension_scores(
    vector: VectorSteering, effects: Effects, order: str, seed: int = 0
) -> dict[int, Tensor]:
    """Return layer -> score `[d_model]` of every dimension; those with the highest are kept.

    Orders are `attribution`: IE, so that what works against the steering goes first; `slope`:
    |r| = |IE / s|, the source's; `magnitude`: |s|; `random`; `bottom`: the reverse of `attribution`.
    """
    choice("order", order, ORDERS)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[int, Tensor] = {}
    for layer, s in changes(vector).items():
        if order == "random":
            scores[layer] = torch.rand(len(s), generator=generator)
        elif order == "magnitude":
            scores[layer] = s.abs()
        elif order == "slope":
            # A dimension that is not moved has nothing to keep.
            scores[layer] = torch.where(s == 0, -1.0, (effects[layer] / s).abs())
        else:
            scores[layer] = effects[layer] if order == "attribution" else -effects[layer]
    return scores


def kept_dimensions(scores: Effects, share: float) -> dict[int, Tensor]:
    """Return layer -> bool `[d_model]`: the share of highest score, all layers pooled; at least one."""
    if not 0 < share <= 1:
        raise TrimtabError(
            asked=f"to keep a share of {share} of the dimensions",
            found="a share outside (0, 1]",
            advice="give e.g. 0.1 to keep a tenth",
        )
    pooled = torch.cat([scores[layer] for layer in scores])
    kept = torch.zeros(len(pooled), dtype=torch.bool)
    kept[pooled.argsort(descending=True, stable=True)[: max(1, round(share * len(pooled)))]] = True
    sizes = [len(scores[layer]) for layer in scores]
    return dict(zip(scores, kept.split(sizes), strict=True))
