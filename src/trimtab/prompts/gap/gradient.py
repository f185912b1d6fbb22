"""Gradient vector search: the vector that would close the gap at the slot, built up from tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trimtab.models.gradients import frozen
from trimtab.prompts.gap.readings import GapReading, Reader
from trimtab.prompts.gap.steps import GapStep, Grown, Slot, grow
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress

_GRADIENT_COST = 3  # a backward pass takes about two forward ones


def gradient_search(
    reader: Reader,
    bound: Bound,
    *,
    max_tokens: int = 12,
    goal: float = 0.9,
    margin: float = 0.0,
    top_k: int = 32,
    progress: Progress | None = None,
) -> Grown:
    """Close a gap by tokens whose embeddings point along its gradient.

    At each step a vector stands after the slot, at first the mean embedding of the allowed tokens;
    delta* is the gradient of sign * gap with respect to it, meaned over the train prompts. The
    `top_k` allowed tokens by cosine, (E(t) . delta*) / (|E(t)| |delta*|), are measured exactly, and
    the best one is appended, if it gains anything. To first order a token's gain is
    (E(t) - vector) . delta* beyond what the vector itself does.

    Source: the retrospective of arXiv 2506.24056's authors, which treats prompts as vectors at the
    embedding.

    All other arguments, and the errors, are those of `sort_sum_stop`.
    """
    sign = reader.objective.sign
    table = token_embeddings(reader.lm).detach().float()
    allowed = bound.allowed[: len(table)].to(table.device)
    middle = table[allowed].mean(0)
    first: Tensor | None = None

    def extend(
        slot: Slot, now: GapReading, open_: float, room: int
    ) -> tuple[list[GapStep], Slot, GapReading]:
        nonlocal first
        gap, delta = _gradient(reader, torch.cat([table[list(slot)], middle[None]]))
        first = delta if first is None else first
        cosines = cosine_similarity(table, delta[None], dim=-1).masked_fill(~allowed, -2.0)
        order = cosines.argsort(descending=True)[: len(bound.pool)].tolist()
        longer = bound.first_legal(((*slot, t) for t in order), top_k, depth=len(order))
        if not longer:
            return [], slot, now
        found = reader.read(longer)
        gains = sign * (found.gaps - now.gaps).mean(-1)
        best = int(gains.argmax())
        token, gain = longer[best][-1], float(gains[best])
        predicted = gap + float((table[token] - middle) @ delta) - float(sign * now.gaps.mean())
        shift = float((found.shifts - now.shifts)[best].mean())
        step = GapStep(
            token, bound.text([token]), predicted, gain, shift, float(cosines[token]), gain > 0
        )
        return ([step], longer[best], found.only(best)) if step.kept else ([step], slot, now)

    found = grow(reader, "gradient", extend, max_tokens, goal, margin, progress)
    if first is None or not found.slot:
        return found
    rebuilt = cosine_similarity(table[list(found.slot)].sum(0), first, dim=0)
    return replace(found, reconstruction=float(rebuilt))


def _gradient(reader: Reader, vectors: Tensor) -> tuple[float, Tensor]:
    """The mean of sign * gap with these vectors in the slot, and its gradient at the last one."""
    vectors = vectors.clone().requires_grad_(True)
    with frozen(reader.lm.model):
        loss = soft_loss(reader.lm, reader.rows, vectors, reader.objective)
        (gradient,) = torch.autograd.grad(loss, vectors)
    reader.sequences += _GRADIENT_COST * len(reader.rows)
    return -float(loss.detach()), -gradient[-1].float()
