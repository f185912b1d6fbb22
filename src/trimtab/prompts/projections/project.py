"""From vectors to allowed tokens: runs a projection by name and scores what it gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.models.model import LanguageModel
from trimtab.prompts.projections import lattice, mixture, straight_through
from trimtab.prompts.projections.registry import (
    PROJECTIONS,
    Legal,
    Projection,
    ProjectionTask,
    register,
    slot_losses,
)
from trimtab.prompts.soft.soft import Soft, allowed_tokens
from trimtab.prompts.task.rows import Row, slot_text
from trimtab.results.tables import Printable, Table, number

__all__ = [
    "PROJECTIONS",
    "Projected",
    "Projection",
    "ProjectionTask",
    "lattice",
    "mixture",
    "nearest",
    "project",
    "register",
    "slot_losses",
    "straight_through",
]


@dataclass(frozen=True)
class Projected(Printable):
    """A soft prompt as tokens.

    Attributes:
        method: the projection.
        ids: allowed tokens, as many as there were vectors.
        text: theirs.
        loss: of the tokens on all rows.
        soft_loss: of the vectors.
        legal: whether `legal` took them; None where it was not asked.
        seconds: the projection took.
    """

    method: str
    ids: tuple[int, ...]
    text: str
    loss: float
    soft_loss: float
    legal: bool | None
    seconds: float

    def table(self) -> Table:
        """Return one line per fact."""
        rows = (
            ("text", repr(self.text)),
            ("loss of the tokens", number(self.loss, 3)),
            ("loss of the vectors", number(self.soft_loss, 3)),
            ("legal", {None: "not asked", True: "yes", False: "no"}[self.legal]),
            ("seconds", number(self.seconds, 1)),
        )
        return Table(f"Projection by {self.method}", ("", ""), rows)


def project(
    lm: LanguageModel,
    rows: Sequence[Row],
    soft: Soft,
    method: str = "nearest",
    *,
    generator: torch.Generator,
    allowed: Tensor | None = None,
    legal: Legal | None = None,
    **options: Any,
) -> Projected:
    """Project a soft prompt to allowed tokens, and score them.

    Args:
        lm: the model.
        rows: what the cross-entropy is read on.
        soft: the vectors.
        method: one of `PROJECTIONS`; see docs/methods/projection.md.
        generator: of whatever is random.
        allowed: bool `[vocab]`; all but special tokens when absent.
        legal: as in `ProjectionTask`, such as `Bound.legal`.
        **options: of the method.

    Raises:
        TrimtabError: an unknown method or option.
    """
    projection = PROJECTIONS[method]
    began = time.perf_counter()
    mask = allowed_tokens(lm, allowed)
    task = ProjectionTask(lm, tuple(rows), soft, mask, generator, legal)
    ids = projection(task, **options)
    seconds = time.perf_counter() - began
    return Projected(
        method=method,
        ids=ids,
        text=slot_text(lm, ids),
        loss=float(slot_losses(lm, task.rows, [ids])[0]),
        soft_loss=soft.loss,
        legal=None if legal is None else bool(legal([ids])[0]),
        seconds=seconds,
    )


@register("nearest")
def nearest(task: ProjectionTask) -> tuple[int, ...]:
    """Take the allowed token of largest cosine at each position."""
    return task.ids(task.cosines(task.vectors).argmax(-1))
