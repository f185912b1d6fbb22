"""The straight-through projection: the gradient of the nearest tokens moves a continuous copy."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.models.gradients import frozen
from trimtab.passes.adam import adam
from trimtab.prompts.projections.project import ProjectionTask, register
from trimtab.prompts.scoring.objective import CrossEntropy
from trimtab.prompts.soft.embeddings import soft_loss
from trimtab.prompts.soft.soft import drawing, embedding_scale


@register("straight_through")
def straight_through(
    task: ProjectionTask,
    *,
    steps: int = 60,
    learning_rate: float = 0.5,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    keep: int = 12,
) -> tuple[int, ...]:
    """Descend by AdamW on a continuous copy with the gradient taken at its nearest tokens.

    The best `keep` slots met are scored on all rows; a step takes `batch_size` of them. The rate is
    per coordinate, in units of the embeddings' root mean square.

    Source: PEZ, Wen et al. 2023 (arXiv 2302.03668).
    """
    copy = task.vectors.clone().requires_grad_(True)
    met: dict[tuple[int, ...], float] = {}
    draw = drawing(task.rows, batch_size, task.generator)

    def gradients(step: int) -> tuple[Tensor, ...]:
        places = task.cosines(copy.detach()).argmax(-1)
        at = task.embeddings[places].clone().requires_grad_(True)
        loss = soft_loss(task.lm, draw(), at, CrossEntropy())
        ids = task.ids(places)
        met[ids] = min(met.get(ids, float("inf")), float(loss.detach()))
        return torch.autograd.grad(loss, at)

    with frozen(task.lm.model):
        adam(
            [copy],
            gradients,
            what="a straight-through projection",
            steps=steps,
            learning_rate=learning_rate * embedding_scale(task.lm),
            decay=False,
            weight_decay=weight_decay,
        )
    met.setdefault(task.ids(task.cosines(copy.detach()).argmax(-1)), float("inf"))
    return task.best(sorted(met, key=met.__getitem__), keep)
