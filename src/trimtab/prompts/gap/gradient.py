"""Gradient vector search: the vector that would close the gap at the slot, built up from tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trimtab.errors import TrimtabError
from trimtab.models.gradients import frozen
from trimtab.prompts.gap.sort_sum_stop import need
from trimtab.prompts.gap.steps import Found, GapStep, concluded
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.results import Progress

if TYPE_CHECKING:
    from trimtab.prompts.gap.readings import Reader
    from trimtab.prompts.task.constraints import Bound

Slot = tuple[int, ...]
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
) -> Found:
    """Close a gap by tokens whose embeddings point along its gradient.

    At each step a vector stands behind the slot, at first the mean embedding of the allowed tokens;
    delta* is the gradient of sign * gap with respect to it, meaned over the train prompts. The
    `top_k` allowed tokens by cosine, (E(t) . delta*) / (|E(t)| |delta*|), are measured exactly, and
    the best one is appended, if it gains anything. To first order a token's gain is
    (E(t) - vector) . delta* beyond what the vector itself does.

    Source: the retrospective of arXiv 2506.24056's authors, which treats prompts as vectors at the
    embedding.

    Args:
        reader: Reads slots on the train prompts.
        bound: What a slot may hold.
        max_tokens: Most tokens of the slot.
        goal: Share of train prompts to close.
        margin: Gap wanted beyond zero.
        top_k: Tokens measured per step.
        progress: Called with tokens in the slot and `max_tokens`.

    Raises:
        TrimtabError: A goal that is no share, or no tokens allowed.
    """
    if not 0 < goal <= 1 or max_tokens < 1 or top_k < 1:
        raise TrimtabError(
            f"a gap search with goal {goal}, {max_tokens} tokens, top_k {top_k}",
            "no share from 0 to 1, or no tokens",
            "use a goal such as 0.9 and one token or more",
        )
    sign, lm, rows = reader.objective.sign, reader.lm, reader.rows
    fed = reader.sequences - len(rows)
    table = token_embeddings(lm).detach().float()
    allowed = bound.allowed[: len(table)].to(table.device)
    middle = table[allowed].mean(0)
    slot: Slot = ()
    now = reader.bare
    steps: list[GapStep] = []
    first: Tensor | None = None
    stopped = ""
    while not stopped:
        if slot and need(sign * now.gaps[0], goal) + margin <= 0:
            stopped = "closed"
        elif len(slot) == max_tokens:
            stopped = f"{max_tokens} tokens used"
        else:
            vectors = torch.cat([table[list(slot)], middle[None]])
            gap, delta = _gradient(reader, vectors)
            first = delta if first is None else first
            cosines = cosine_similarity(table, delta[None], dim=-1).masked_fill(~allowed, -2.0)
            tokens = _legal(bound, slot, cosines, top_k)
            if not tokens:
                stopped = "no legal token"
                break
            found = reader.read([(*slot, token) for token in tokens])
            gains = sign * (found.gaps - now.gaps).mean(-1)
            best = int(gains.argmax())
            token, before = tokens[best], float(sign * now.gaps.mean())
            predicted = gap + float((table[token] - middle) @ delta) - before
            gain = float(gains[best])
            steps.append(
                GapStep(
                    token, bound.text([token]), predicted, gain,
                    float((found.shifts - now.shifts)[best].mean()), float(cosines[token]), gain > 0,
                )
            )  # fmt: skip
            if gain <= 0:
                stopped = "no token that helps when measured"
            else:
                slot = (*slot, token)
                now = type(found)(
                    *(getattr(found, n)[best : best + 1] for n in ("gaps", "shifts", "masses"))
                )
        if progress is not None:
            progress(len(slot), max_tokens)
    rebuilt = None
    if first is not None and slot:
        rebuilt = float(cosine_similarity(table[list(slot)].sum(0), first, dim=0))
    return concluded(reader, "gradient", slot, steps, now, stopped, fed, rebuilt)


def _gradient(reader: Reader, vectors: Tensor) -> tuple[float, Tensor]:
    """The mean of sign * gap with these vectors in the slot, and its gradient at the last one."""
    vectors = vectors.clone().requires_grad_(True)
    with frozen(reader.lm.model):
        loss = soft_loss(reader.lm, reader.rows, vectors, reader.objective)
        (gradient,) = torch.autograd.grad(loss, vectors)
    reader.sequences += _GRADIENT_COST * len(reader.rows)
    return -float(loss.detach()), -gradient[-1].float()


def _legal(bound: Bound, slot: Slot, cosines: Tensor, top_k: int) -> list[int]:
    """The tokens of largest cosine that are legal behind the slot."""
    ranked = [t for t in cosines.argsort(descending=True).tolist() if float(cosines[t]) > -2.0]
    tokens: list[int] = []
    for start in range(0, len(ranked), 4 * top_k):
        part = ranked[start : start + 4 * top_k]
        legal = bound.legal([(*slot, token) for token in part])
        tokens += [token for token, good in zip(part, legal, strict=True) if good]
        if len(tokens) >= top_k:
            break
    return tokens[:top_k]
