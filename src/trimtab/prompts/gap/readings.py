"""What slots do at the first answer position: the gap, the shift, the wanted side's mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.evaluation.divergence import token_kl
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.prompts.scoring.feeding import beginning
from trimtab.prompts.scoring.objective import GapLoss
from trimtab.prompts.task.rows import PromptRow


class GapReading(NamedTuple):
    """One entry per slot and row, float64 `[slots, rows]` on the CPU.

    Attributes:
        gaps: toward minus away, in the units of the objective's aggregator.
        shifts: KL(without the slot || with it) of the next token, in nats.
        masses: log-probability of all tokens of the wanted side together.
    """

    gaps: Tensor
    shifts: Tensor
    masses: Tensor

    def only(self, slot: int) -> GapReading:
        """The reading of one slot, `[1, rows]`."""
        return GapReading(*(values[slot : slot + 1] for values in self))


class Reader:
    """Reads slots on some rows beside the same prompts without a slot.

    Attributes:
        lm: the model.
        rows: without targets.
        objective: says which tokens, which sign, which aggregator.
        sequences: prompts fed so far, one per slot and row.
        bare: the reading of the prompts as they are, `[1, rows]`.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[PromptRow], objective: GapLoss) -> None:
        """Read the prompts as they are."""
        self.lm, self.rows, self.objective, self.sequences = lm, rows, objective, 0
        self._log_p = self._log_probs([lm.encode(row.request) for row in rows])
        self.bare = self._reading(self._log_p[None])

    def read(self, slots: Sequence[Sequence[int]], count: int | None = None) -> GapReading:
        """Return what each slot does on each row, or on the first `count` of them."""
        rows = self.rows[:count]
        found: list[GapReading] = []
        # A vocabulary's worth of numbers per prompt: not all at once.
        size = max(1, 2**25 // (len(rows) * self._log_p.shape[-1]))
        for start in range(0, len(slots), size):
            part = slots[start : start + size]
            log_p = self._log_probs([row.encoded(slot) for slot in part for row in rows])
            found.append(self._reading(log_p.reshape(len(part), len(rows), -1)))
        return GapReading(*map(torch.cat, zip(*found, strict=True)))

    def next_token(self, slot: Sequence[int]) -> Tensor:
        """Return log-probabilities of the token after `before + slot`, `[rows, vocab]`."""
        return self._log_probs([beginning((*row.before, *slot)) for row in self.rows])

    def slot_nll(self, slot: Sequence[int]) -> float:
        """Return the mean -log p of the slot's own tokens in their place, in nats."""
        total = 0.0
        for i, token in enumerate(slot):
            total -= float(self.next_token(slot[:i])[:, token].mean())
        return total / max(1, len(slot))

    def _reading(self, log_p: Tensor) -> GapReading:
        wanted = self.objective.toward if self.objective.sign > 0 else self.objective.away
        return GapReading(
            gaps=self.objective.gaps(log_p).double(),
            shifts=token_kl(self._log_p[: log_p.shape[1]], log_p),
            masses=log_p[..., wanted].logsumexp(-1).double(),
        )

    def _log_probs(self, items: Sequence[Encoded]) -> Tensor:
        """Log-probabilities of the token after each prompt, float32 `[prompts, vocab]`."""
        self.sequences += len(items)
        return self.lm.logits_after(items).log_softmax(-1)
