"""A slot as vectors: token embeddings, the loss of a soft slot, the gradient of a discrete one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trimtab.models.batch import Batch
from trimtab.models.gradients import frozen
from trimtab.models.model import LanguageModel
from trimtab.prompts.scoring.objective import Objective
from trimtab.prompts.task.rows import PromptRow
from trimtab.steering.soft_tokens import soft_tokens


@torch.no_grad()
def token_embeddings(lm: LanguageModel, ids: Sequence[int] | None = None) -> Tensor:
    """Return the embeddings of tokens, of the whole vocabulary by default, `[tokens, d_model]`.

    As the embedding module returns them: what goes in as `inputs_embeds`.
    """
    embedding = lm.model.get_input_embeddings()
    rows = next(embedding.parameters()).shape[0]
    wanted = torch.arange(rows) if ids is None else torch.tensor(list(ids), dtype=torch.long)
    return embedding(wanted.to(lm.device)[None])[0]


@contextmanager
def standing(lm: LanguageModel, rows: Sequence[PromptRow], vectors: Tensor) -> Iterator[Batch]:
    """All rows in one padded batch, with vectors `[k, d_model]` in the slot for calls made inside."""
    with soft_tokens(lm, vectors) as slot:
        encoded = [row.encoded(slot) for row in rows]
        longest = max(len(item.ids) for item in encoded)
        (batch,) = lm.batches(encoded, longest * len(rows), len(rows))
        yield batch


def soft_loss(
    lm: LanguageModel, rows: Sequence[PromptRow], vectors: Tensor, objective: Objective
) -> Tensor:
    """Return the loss over rows of vectors `[k, d_model]` in their slot, differentiable in them.

    The vectors are in the units of `inputs_embeds`; the rows are one batch.
    """
    keep = max(objective.keep(row) for row in rows)
    with standing(lm, rows, vectors) as batch:
        logits = lm.forward(batch, logits_to_keep=keep).float()
    ordered = [rows[i] for i in batch.rows.tolist()]
    weights = torch.tensor([objective.weight(row) for row in ordered], device=logits.device)
    return (objective.values(logits, ordered) * weights).sum() / weights.sum()


def onehot_gradient(
    lm: LanguageModel, rows: Sequence[PromptRow], slot: Sequence[int], objective: Objective
) -> tuple[float, Tensor]:
    """Return the loss of a slot and d loss / d one-hot, float32 `[k, vocab]`.

    A slot is x E with one-hot rows x `[k, vocab]`, so d loss / d x = (d loss / d e) E^T; entry
    [i, b] minus entry [i, a] predicts, to first order, what replacing a by b does (HotFlip,
    Ebrahimi et al. 2018).
    """
    table = token_embeddings(lm)
    vectors = table[list(slot)].detach().clone().requires_grad_(True)
    with frozen(lm.model):
        loss = soft_loss(lm, rows, vectors, objective)
        (gradient,) = torch.autograd.grad(loss, vectors)
    return float(loss.detach()), gradient.float() @ table.float().T
