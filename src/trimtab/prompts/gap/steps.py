"""A gap search's trace: what each token was predicted to do, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimtab.results.intervals import spearman
from trimtab.results.tables import Printable, Table, number

if TYPE_CHECKING:
    from trimtab.prompts.gap.readings import Reader, Reading


@dataclass(frozen=True)
class GapStep:
    """One token put into the slot; gains are changes of sign * gap, meaned over the train prompts.

    Attributes:
        token: its id.
        text: what it says.
        predicted: gain predicted: that of the token alone (sort), or to first order (gradient).
        true: gain measured when it was added behind the others.
        shift: KL of the next token's distribution that it was predicted to cost, in nats.
        alignment: cosine of its embedding with the gap's gradient there; None where not used.
        kept: whether it stayed: tokens behind the best point are taken away again.
    """

    token: int
    text: str
    predicted: float
    true: float
    shift: float = 0.0
    alignment: float | None = None
    kept: bool = True


@dataclass(frozen=True)
class Found(Printable):
    """What a gap search found on its train prompts.

    Attributes:
        method: `sort` or `gradient`.
        slot: the tokens.
        steps: in the order of adding.
        gap_before: mean of sign * gap on the train prompts as they are; negative where open.
        gap_after: with the slot.
        closed: share of train prompts with sign * gap > 0.
        stopped: why.
        sequences: prompts fed, one per candidate and prompt; gradients count as three.
        reconstruction: cosine of the tokens' summed embeddings with the first gradient; None where
            no gradient was taken.
    """

    method: str
    slot: tuple[int, ...]
    steps: tuple[GapStep, ...]
    gap_before: float
    gap_after: float
    closed: float
    stopped: str
    sequences: int
    reconstruction: float | None = None

    @property
    def additivity(self) -> float | None:
        """Sum of true gains over sum of predicted ones: 1 if effects of tokens add up."""
        predicted = sum(step.predicted for step in self.steps)
        return sum(step.true for step in self.steps) / predicted if predicted else None

    @property
    def order(self) -> float | None:
        """Rank correlation of predicted with true gains; None for fewer than three tokens."""
        if len(self.steps) < 3:
            return None
        both = torch.tensor([[s.predicted for s in self.steps], [s.true for s in self.steps]])
        return spearman(both[0], both[1])

    def table(self) -> Table:
        """Return one line per token."""
        rows = tuple(
            (
                repr(step.text) + ("" if step.kept else " (taken away)"),
                number(step.predicted),
                number(step.true),
                number(step.shift),
                "" if step.alignment is None else number(step.alignment),
            )
            for step in self.steps
        )
        notes = (
            f"{self.method}: mean gap {number(self.gap_before)} -> {number(self.gap_after)}, "
            f"{100 * self.closed:.0f} % of train prompts closed; {self.stopped}",
        )
        columns = ("token", "predicted gain", "true gain", "shift (nats)", "cosine")
        return Table("tokens of a gap search", columns, rows, notes)


def concluded(
    reader: Reader,
    method: str,
    slot: tuple[int, ...],
    steps: Sequence[GapStep],
    now: Reading,
    stopped: str,
    fed: int,
    reconstruction: float | None = None,
) -> Found:
    """Return the result of a search whose last reading is `now`.

    Args:
        reader: what it read with.
        method: `sort` or `gradient`.
        slot: the tokens kept.
        steps: all that were tried.
        now: the reading of the slot.
        stopped: why.
        fed: prompts that the reader had fed before.
        reconstruction: see `Found`.
    """
    sign = reader.objective.sign
    return Found(
        method=method,
        slot=slot,
        steps=tuple(steps),
        gap_before=float(sign * reader.bare.gaps.mean()),
        gap_after=float(sign * now.gaps.mean()),
        closed=float((sign * now.gaps > 0).double().mean()),
        stopped=stopped,
        sequences=reader.sequences - fed,
        reconstruction=reconstruction,
    )
