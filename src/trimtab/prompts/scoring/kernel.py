"""The search kernel: exact losses of many candidate slots, and the best of them, for little.

Losses are those of `plain_loss`, with savings or without; only the work differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.prompts.scoring import race
from trimtab.prompts.scoring.draft import bfloat16_copy, worthwhile
from trimtab.prompts.scoring.objective import CrossEntropy, Objective
from trimtab.prompts.scoring.passes import Passes, Slot, common_trunk
from trimtab.prompts.scoring.room import Room
from trimtab.prompts.soft.embeddings import onehot_gradient
from trimtab.prompts.task.rows import PromptRow

MAX_TOKENS = 4096
# Estimates of a race are worth keeping for as long as a search stays where it is.
_ESTIMATES = 100_000


@dataclass(frozen=True)
class Counts:
    """What a kernel has been asked and what that has cost.

    Attributes:
        asked: Candidates that callers wanted a loss of.
        duplicates: Those equal to another one of their call.
        memo_hits: Those whose exact loss was known.
        scored: Candidates of which anything was computed, in whatever round.
        exact: Candidates scored on every row and token.
        calls: Forward passes of the model; one batch is one call.
        tokens: Token positions fed in them, padding counted.
        draft_calls: Forward passes of the draft model.
        draft_tokens: Token positions fed to it.
        gradients: Gradients; their passes are not among `calls`.
        seconds: Spent in the kernel.
    """

    asked: int = 0
    duplicates: int = 0
    memo_hits: int = 0
    scored: int = 0
    exact: int = 0
    calls: int = 0
    tokens: int = 0
    draft_calls: int = 0
    draft_tokens: int = 0
    gradients: int = 0
    seconds: float = 0.0

    def __sub__(self, earlier: Counts) -> Counts:
        return self.plus(**{f.name: -getattr(earlier, f.name) for f in fields(self)})

    def plus(self, **more: float) -> Counts:
        """The same with some raised."""
        return replace(self, **{name: getattr(self, name) + by for name, by in more.items()})


class Kernel:
    """Scores candidates for the slot of some rows.

    It keeps keys, values and losses: make a new one when the model's weights, steering or adapters
    have changed. `counts` holds what has been asked and spent so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[PromptRow],
        objective: Objective | None = None,
        max_tokens: int = MAX_TOKENS,
        draft: LanguageModel | None = None,
        savings: bool = True,
    ) -> None:
        """Look at the rows.

        Args:
            lm: The model.
            rows: What a loss is averaged over, one or more.
            objective: What is lowered; the cross-entropy of the targets by default.
            max_tokens: Most token positions fed in one call; halved when memory runs out.
            draft: Ranks first; by default a bfloat16 copy of the model where that is much faster.
            savings: Off, every candidate is scored on all rows and tokens without a cache: the
                losses are the same, and `best` ranks exactly.

        Raises:
            TrimtabError: A draft model with another vocabulary.
        """
        self.lm = lm
        self.rows = tuple(rows)
        self.objective = objective or CrossEntropy()
        self.savings = savings
        if draft is not None and draft.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise TrimtabError(
                f"{draft.name} as a draft of {lm.name}",
                "a tokenizer with another vocabulary",
                "use a model of the same family, or none: a bfloat16 copy is made where that helps",
            )
        self.counts = Counts()
        self._room = Room(max_tokens)
        self._passes = self._passes_of(lm, "")
        self._draft: Passes | None = None
        self._given_draft = draft
        self._exact: dict[Slot, float] = {}
        self._estimates: dict[race.Round, dict[Slot, float]] = {}

    def one(self, slot: Sequence[int]) -> float:
        """The exact loss of one candidate."""
        return float(self.losses([slot])[0])

    def losses(self, slots: Sequence[Sequence[int]]) -> Tensor:
        """Return exact losses, float64 `[candidates]`; lengths may differ.

        Raises:
            TrimtabError: A candidate that is too long for the model.
        """
        with self._timed():
            asked, different = self._asked(slots)
            known = dict(zip(different, self._score_exactly(different), strict=True))
            return torch.tensor([known[slot] for slot in asked], dtype=torch.float64)

    def best(
        self, slots: Sequence[Sequence[int]], bar: float | None = None, keep: int = 1
    ) -> list[tuple[int, float]]:
        """Find the likely best candidates below a bar; without savings, the best.

        Returns at most `keep` places in `slots` and exact losses, the lowest first; of equal
        candidates one.
        """
        with self._timed():
            asked, different = self._asked(slots)
            # Known losses do not spare a candidate the race: a search that was interrupted, and
            # knows fewer, is to go the same way.
            left = self._raced(different, keep)
            losses = self._score_exactly(left)
            places = {slot: i for i, slot in reversed(list(enumerate(asked)))}
            found = {places[slot]: loss for slot, loss in zip(left, losses, strict=True)}
            below = [(i, x) for i, x in found.items() if bar is None or x < bar]
            return sorted(below, key=lambda pair: (pair[1], pair[0]))[:keep]

    def gradient(self, slot: Sequence[int]) -> tuple[float, Tensor]:
        """Return the loss of a slot and d loss / d one-hot, float32 `[k, vocab]`."""
        with self._timed():
            chosen = tuple(slot)
            columns = max(len(row.ids(chosen)) for row in self.rows)

            def work(rows: Sequence[PromptRow]) -> tuple[float, float, Tensor]:
                weight = sum(self.objective.weight(row) for row in rows)
                return weight, *onehot_gradient(self.lm, rows, chosen, self.objective)

            # A backward pass keeps what a forward pass may forget.
            parts = list(self._room.over(self.rows, work, 4 * columns))
            weights = sum(weight for weight, _, _ in parts)
            self._count(gradients=1)
            loss = sum(weight * loss for weight, loss, _ in parts) / weights
            return loss, torch.stack([part * (w / weights) for w, _, part in parts]).sum(0)

    def _score_exactly(self, slots: list[Slot]) -> list[float]:
        """Exact losses, remembered ones among them."""
        fresh = [slot for slot in slots if slot not in self._exact]
        self._count(memo_hits=len(slots) - len(fresh), exact=len(fresh))
        losses = self._passes.losses(fresh, self.rows).tolist()
        if not self.savings:
            return losses
        self._exact.update(zip(fresh, losses, strict=True))
        return [self._exact[slot] for slot in slots]

    def _raced(self, slots: list[Slot], keep: int) -> list[Slot]:
        """The candidates that are worth an exact loss."""
        if not self.savings:
            return slots
        draft = self._draft_passes() if len(slots) > 1 else None
        turn = sum(common_trunk(slots)) % len(self.rows) if slots else 0
        plan = race.rounds(self.rows, len(slots), keep, draft is not None, turn)
        for each in plan:
            losses = dict(zip(slots, self._estimated(slots, each), strict=True))
            slots = sorted(slots, key=losses.__getitem__)[: each.survivors]
        return slots

    def _estimated(self, slots: Sequence[Slot], each: race.Round) -> list[float]:
        known = self._estimates.setdefault(each, {})
        fresh = [slot for slot in slots if slot not in known]
        passes = self._draft if each.draft else self._passes
        assert passes is not None  # planned for
        losses = passes.losses(fresh, each.rows(self.rows)).tolist()
        known.update(zip(fresh, losses, strict=True))
        found = [known[slot] for slot in slots]
        if sum(map(len, self._estimates.values())) > _ESTIMATES:
            self._estimates.clear()
        return found

    def _draft_passes(self) -> Passes | None:
        if self._draft is None:
            lm = self._given_draft
            if lm is None and worthwhile(self.lm):
                lm = bfloat16_copy(self.lm)
            if lm is not None:
                self._draft = self._passes_of(lm, "draft_")
        return self._draft

    def _passes_of(self, lm: LanguageModel, kind: str) -> Passes:
        def count(tokens: int) -> None:
            self._count(**{f"{kind}calls": 1, f"{kind}tokens": tokens})

        return Passes(lm, self.objective, self.savings, self._room, count)

    def _asked(self, slots: Sequence[Sequence[int]]) -> tuple[list[Slot], list[Slot]]:
        """All candidates, and the different ones among them."""
        asked = [tuple(int(token) for token in slot) for slot in slots]
        different = list(dict.fromkeys(asked)) if self.savings else asked
        fresh = sum(slot not in self._exact for slot in different)
        self._count(asked=len(asked), duplicates=len(asked) - len(different), scored=fresh)
        return asked, different

    def _count(self, **more: float) -> None:
        self.counts = self.counts.plus(**more)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._count(seconds=time.perf_counter() - started)
