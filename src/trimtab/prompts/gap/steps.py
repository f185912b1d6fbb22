"""What gap searches share: the loop, and the trace of what each token was predicted to do, and did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.prompts.gap.readings import GapReading, Reader
from trimtab.prompts.task.rows import Slot
from trimtab.results import Progress
from trimtab.results.intervals import spearman
from trimtab.results.tables import Printable, Table, number


@dataclass(frozen=True)
class GapStep:
    """One token put into the slot; gains are changes of sign * gap, meaned over the train prompts.

    Attributes:
        token: its id.
        text: what it says.
        predicted: gain predicted: that of the token alone (sort), or to first order (gradient).
        true: gain measured when it was added after the others.
        shift: KL of the next token's distribution that it was predicted to cost, in nats.
        alignment: cosine of its embedding with the gap's gradient there; None where not used.
        kept: whether it stayed: tokens after the best point are taken away again.
    """

    token: int
    text: str
    predicted: float
    true: float
    shift: float = 0.0
    alignment: float | None = None
    kept: bool = True


@dataclass(frozen=True)
class Grown(Printable):
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


def grow(
    reader: Reader,
    method: str,
    extend: Callable[[Slot, GapReading, float, int], tuple[list[GapStep], Slot, GapReading]],
    max_tokens: int,
    goal: float,
    margin: float,
    progress: Progress | None,
) -> Grown:
    """Extend a slot until the share `goal` of the train prompts is closed by the margin.

    `extend` is called with the slot, its reading, what is still open and how many tokens may be
    added; it gives the tokens that were tried, and the slot and its reading with those that stay.
    """
    if not 0 < goal <= 1 or max_tokens < 1:
        raise TrimtabError(
            f"a gap search with goal {goal} and {max_tokens} tokens",
            "no share from 0 to 1, or no tokens",
            "use a goal such as 0.9 and one token or more",
        )
    sign, fed = reader.objective.sign, reader.sequences
    slot: Slot = ()
    now = reader.bare
    steps: list[GapStep] = []
    stopped = ""
    while not stopped:
        open_ = need(sign * now.gaps[0], goal) + margin
        if open_ <= 0 and slot:
            stopped = "closed"
        elif len(slot) == max_tokens:
            stopped = f"{max_tokens} tokens used"
        else:
            made, slot, now = extend(slot, now, open_, max_tokens - len(slot))
            steps += made
            if not any(step.kept for step in made):
                stopped = "no legal token that helps when measured"
        if progress is not None:
            progress(len(slot), max_tokens)
    return Grown(
        method=method,
        slot=slot,
        steps=tuple(steps),
        gap_before=float(sign * reader.bare.gaps.mean()),
        gap_after=float(sign * now.gaps.mean()),
        closed=float((sign * now.gaps > 0).double().mean()),
        stopped=stopped,
        # The prompts as they are count too.
        sequences=reader.sequences - fed + len(reader.rows),
    )


def need(gaps: Tensor, goal: float) -> float:
    """What has to be gained so that a share `goal` of the prompts is closed."""
    ordered = gaps.sort(descending=True).values
    return -float(ordered[min(len(ordered), math.ceil(goal * len(ordered))) - 1])
