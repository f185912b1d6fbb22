"""From vectors to allowed tokens: what a projection is given, the registry, and running one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trimtab.models.model import LanguageModel
from trimtab.prompts.scoring.objective import CrossEntropy
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.prompts.soft.soft import Soft, allowed_tokens
from trimtab.prompts.task.rows import PromptRow, slot_text
from trimtab.results.registry import Named, Registry

Legal: TypeAlias = "Callable[[Sequence[Sequence[int]]], Sequence[bool]]"
SCORED_TOKENS = 8192  # of a batch of candidates


@dataclass(eq=False)
class ProjectionTask:
    """What a projection is given.

    Attributes:
        lm: the model.
        rows: what the cross-entropy is read on.
        soft: the vectors to project.
        allowed: bool `[vocab]`; only these tokens may come out.
        generator: of whatever is random.
        legal: says of each of a list of slots whether it may be used as a whole; preferred where
            there is a choice. None: every one.
    """

    lm: LanguageModel
    rows: tuple[PromptRow, ...]
    soft: Soft
    allowed: Tensor
    generator: torch.Generator
    legal: Legal | None = None
    pool: Tensor = field(init=False, repr=False)
    embeddings: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look the allowed tokens up: ids `[allowed]`, float32 embeddings `[allowed, d_model]`."""
        self.pool = self.allowed.nonzero().flatten()
        self.embeddings = token_embeddings(self.lm, self.pool.tolist()).detach().float()

    @property
    def vectors(self) -> Tensor:
        """The soft prompt on the model's device."""
        return self.soft.vectors.to(self.embeddings.device)

    def cosines(self, vectors: Tensor) -> Tensor:
        """Cosines of vectors `[k, d_model]` with the allowed tokens' embeddings `[k, allowed]`."""
        return normalize(vectors.float(), dim=-1) @ normalize(self.embeddings, dim=-1).T

    def ids(self, places: Tensor) -> tuple[int, ...]:
        """The token ids at places among the allowed ones."""
        return tuple(self.pool[places.cpu()].tolist())

    def best(self, slots: Sequence[tuple[int, ...]], keep: int) -> tuple[int, ...]:
        """The slot of lowest loss among the first `keep`: legal ones, or any where none is."""
        distinct = list(dict.fromkeys(slots))
        if self.legal is not None:
            distinct = list(compress(distinct, self.legal(distinct))) or distinct
        distinct = distinct[: max(1, keep)]
        if len(distinct) == 1:
            return distinct[0]
        return distinct[int(slot_losses(self.lm, self.rows, distinct).argmin())]


class Projection(Named):
    """A registered projection: its function `(task, *, option=default, ...) -> allowed ids`."""

    def __call__(self, task: ProjectionTask, **options: Any) -> tuple[int, ...]:
        """Project.

        Raises:
            TrimtabError: an unknown option.
        """
        self.check("projection", options, "projection")
        return self.function(task, **options)


PROJECTIONS: Registry[Projection] = Registry("projection", make=Projection)
register = PROJECTIONS.register


@torch.no_grad()
def slot_losses(lm: LanguageModel, rows: Sequence[PromptRow], slots: Sequence[Sequence[int]]) -> Tensor:
    """Return the cross-entropy of each slot over all rows, float64 `[slots]`, in padded batches."""
    objective = CrossEntropy()
    pairs = [(slot, row) for slot in slots for row in rows]
    keep = max(objective.keep(row) for row in rows)
    encoded = [row.encoded(slot) for slot, row in pairs]
    losses = torch.zeros(len(pairs), dtype=torch.float64)
    for batch in lm.batches(encoded, SCORED_TOKENS):
        at = batch.rows.tolist()
        logits = lm.forward(batch, logits_to_keep=keep).float()
        losses[at] = objective.values(logits, [pairs[i][1] for i in at]).double().cpu()
    weights = torch.tensor([objective.weight(row) for row in rows], dtype=torch.float64)
    return (losses.view(len(slots), len(rows)) * weights).sum(-1) / weights.sum()


@dataclass(frozen=True)
class Projected:
    """A soft prompt as tokens.

    Attributes:
        method: the projection.
        ids: allowed tokens, as many as there were vectors.
        text: theirs.
        loss: of the tokens on all rows.
        legal: whether `legal` took them; None where it was not asked.
    """

    method: str
    ids: tuple[int, ...]
    text: str
    loss: float
    legal: bool | None


def project(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    soft: Soft,
    method: str = "nearest",
    *,
    generator: torch.Generator,
    allowed: Tensor | None = None,
    legal: Legal | None = None,
    **options: Any,
) -> Projected:
    """Project a soft prompt to allowed tokens, and score them.

    `method` is one of `PROJECTIONS`, with its options; see docs/methods/projection.md. All else is as
    in `ProjectionTask`; all but special tokens are allowed by default.

    Raises:
        TrimtabError: an unknown method or option.
    """
    mask = allowed_tokens(lm, allowed)
    task = ProjectionTask(lm, tuple(rows), soft, mask, generator, legal)
    ids = PROJECTIONS[method](task, **options)
    return Projected(
        method=method,
        ids=ids,
        text=slot_text(lm, ids),
        loss=float(slot_losses(lm, task.rows, [ids])[0]),
        legal=None if legal is None else bool(legal([ids])[0]),
    )


@register("nearest")
def nearest(task: ProjectionTask) -> tuple[int, ...]:
    """Take the allowed token of largest cosine at each position."""
    return task.ids(task.cosines(task.vectors).argmax(-1))
