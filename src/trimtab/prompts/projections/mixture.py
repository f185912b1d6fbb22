"""Token mixtures: a distribution over allowed tokens at each position, annealed to a corner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.gradients import frozen
from trimtab.passes.adam import adam
from trimtab.prompts.projections.project import ProjectionTask, register
from trimtab.prompts.scoring.objective import CrossEntropy
from trimtab.prompts.soft.embeddings import soft_loss
from trimtab.prompts.soft.soft import drawing


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
    """Train logits z `[k, allowed]`: slot = softmax(z / T) E, T falling, entropy ever dearer.

        minimize  loss(p E) + c * mean entropy(p),   p = softmax(z / T)
        T: 1 -> `temperature` geometrically, c: 0 -> `penalty` linearly, z_0 = sharpness * cosines

    What comes out is the best, on all rows, of the last `keep` corners met, a corner being the
    likeliest tokens. A step of Adam on the logits takes `batch_size` rows. The sharpness is in logits
    per unit of cosine, the penalty in nats of loss per nat of entropy.

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
    corners: list[tuple[int, ...]] = []

    def gradients(step: int) -> tuple[Tensor, ...]:
        share = step / max(1, steps - 1)
        log_p = (logits / math.pow(temperature, share)).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        loss = soft_loss(task.lm, draw(), p @ task.embeddings, CrossEntropy())
        corners.append(task.ids(p.argmax(-1)))
        return torch.autograd.grad(loss + penalty * share * entropy, logits)

    with frozen(task.lm.model):
        adam(
            [logits],
            gradients,
            what="an annealed mixture",
            steps=steps,
            learning_rate=learning_rate,
            decay=False,
        )
    return task.best(corners[::-1], keep)
