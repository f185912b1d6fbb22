"""Token mixtures: a distribution over allowed tokens at each position, annealed to a corner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.gradients import frozen
from trimtab.passes.adam import adam
from trimtab.prompts.projections.registry import ProjectionTask, register
from trimtab.prompts.soft.embeddings import soft_loss
from trimtab.prompts.soft.soft import drawing


@dataclass(frozen=True, eq=False)
class Mixture:
    """Where an annealed mixture went.

    Attributes:
        probabilities: float32 `[k, allowed]`, of the last step.
        entropies: mean entropy per position at each step, in nats.
        losses: of the mixture at each step, on that step's rows.
        corners: the distinct most likely tokens, the last ones last.
    """

    probabilities: Tensor = field(repr=False)
    entropies: tuple[float, ...]
    losses: tuple[float, ...]
    corners: tuple[tuple[int, ...], ...]


@register("mixture")
def mixture(
    task: ProjectionTask,
    *,
    steps: int = 60,
    learning_rate: float = 0.3,
    sharpness: float = 15.0,
    temperature: float = 0.1,
    penalty: float = 0.3,
    batch_size: int | None = None,
    keep: int = 8,
) -> tuple[int, ...]:
    """Anneal a mixture to a corner, and return the best of the last corners; see `anneal`.

    Args:
        task: what to project.
        steps: of Adam.
        learning_rate: of the logits.
        sharpness: logit per unit of cosine at the start.
        temperature: at the end; 1 at the start.
        penalty: of the entropy at the end, in nats of loss per nat; 0 at the start.
        batch_size: rows a step; all when absent.
        keep: so many of the last corners are scored on all rows.
    """
    found = anneal(
        task,
        steps=steps,
        learning_rate=learning_rate,
        sharpness=sharpness,
        temperature=temperature,
        penalty=penalty,
        batch_size=batch_size,
    )
    return task.best(found.corners[::-1], keep)


def anneal(
    task: ProjectionTask,
    *,
    steps: int,
    learning_rate: float,
    sharpness: float,
    temperature: float,
    penalty: float,
    batch_size: int | None = None,
) -> Mixture:
    """Train logits z `[k, allowed]`: slot = softmax(z / T) E, T falling, entropy ever dearer.

        minimize  loss(p E) + c * mean entropy(p),   p = softmax(z / T)
        T: 1 -> `temperature` geometrically, c: 0 -> `penalty` linearly, z_0 = sharpness * cosines

    Source: GBDA, Guo et al. 2021 (arXiv 2104.13733), without its Gumbel noise; the entropy as in
    projected gradient descent on relaxed one-hots, Geisler et al. 2024 (arXiv 2402.09154).

    Raises:
        TrimtabError: a number out of range.
    """
    if steps < 1 or not 0 < temperature <= 1 or min(learning_rate, sharpness) <= 0 or penalty < 0:
        raise TrimtabError(
            "an annealed mixture",
            f"steps={steps}, temperature={temperature}, learning_rate={learning_rate}, "
            f"sharpness={sharpness}, penalty={penalty}",
            "use steps from 1, a final temperature in (0, 1], and positive numbers",
        )
    logits = (sharpness * task.cosines(task.vectors)).requires_grad_(True)
    draw = drawing(task.rows, batch_size, task.generator)
    entropies: list[float] = []
    losses: list[float] = []
    corners: dict[tuple[int, ...], None] = {}
    p = logits.detach().softmax(-1)

    def gradients(step: int) -> tuple[Tensor, ...]:
        nonlocal p
        share = step / max(1, steps - 1)
        log_p = (logits / math.pow(temperature, share)).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        loss = soft_loss(task.lm, draw(), p @ task.embeddings, task.objective)
        entropies.append(float(entropy.detach()))
        losses.append(float(loss.detach()))
        corner = task.ids(p.detach().argmax(-1))
        corners.pop(corner, None)
        corners[corner] = None
        return torch.autograd.grad(loss + penalty * share * entropy, logits)

    with frozen(task.lm.model):
        adam(
            [logits],
            gradients,
            what="an annealed mixture",
            steps=steps,
            learning_rate=learning_rate,
            decay=False,
            progress=task.progress,
        )
    return Mixture(p.detach(), tuple(entropies), tuple(losses), tuple(corners))
