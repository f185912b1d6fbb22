"""The lattice projection: the few nearest tokens of each position, searched with a beam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.prompts.projections.project import ProjectionTask, register
from trimtab.prompts.scoring.feeding import beginning


@register("lattice")
def lattice(
    task: ProjectionTask,
    *,
    top: int = 24,
    width: int = 64,
    prior: float = 0.02,
    keep: int = 48,
) -> tuple[int, ...]:
    """Search the `top` nearest tokens of each position for sequences that are near and likely.

        cost = sum_i (1 - cos(v_i, E(t_i))) - prior * log p(t_i | head, t_1 .. t_{i-1})

    The beam holds `width`; its best `keep` are scored exactly on all rows, legal ones first. The
    prior, the model's own log-probability, weighs in cosine per nat.

    Raises:
        TrimtabError: a number out of range.
    """
    if min(top, width, keep) < 1 or prior < 0:
        raise TrimtabError(
            "a lattice projection",
            f"top={top}, width={width}, keep={keep}, prior={prior}",
            "use counts from 1 and a prior from 0",
        )
    near = task.cosines(task.vectors).topk(min(top, len(task.pool)), dim=-1)
    beam: list[tuple[int, ...]] = [()]
    cost = torch.zeros(1, dtype=torch.float64)
    for position in range(near.indices.shape[0]):
        ids = task.pool[near.indices[position].cpu()]
        step = (1 - near.values[position].double().cpu()).expand(len(beam), -1)
        if prior:
            step = step - prior * _log_prior(task, beam)[:, ids].double()
        total = (cost[:, None] + step).flatten()
        # A wider beam where sequences may turn out illegal at the end.
        wide = width if task.legal is None else 4 * width
        best = total.topk(min(wide, len(total)), largest=False)
        cost = best.values
        beam = [
            (*beam[place // len(ids)], int(ids[place % len(ids)]))
            for place in best.indices.tolist()
        ]
    return task.best(beam, keep)


def _log_prior(task: ProjectionTask, beam: Sequence[tuple[int, ...]]) -> Tensor:
    """Return log p of the next token after each partial slot, float32 `[beam, vocab]`.

    Before a suffix stands the request, so the mean over the rows' contexts is taken; four say
    enough.
    """
    contexts = list(dict.fromkeys(row.before for row in task.rows))[:4]
    found = [
        task.lm.logits_after([beginning((*context, *slot)) for slot in beam]).log_softmax(-1)
        for context in contexts
    ]
    return torch.stack(found).sum(0) / len(contexts)
