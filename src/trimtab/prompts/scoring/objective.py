"""What a prompt search lowers, and the plain loss that every faster way has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimtab.evaluation.readout import ReadoutTokens, gap_of
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.rows import PromptRow


class Objective(Protocol):
    """A loss per row, read from the last logits; over rows it is the mean weighted by `weight`."""

    def keep(self, row: PromptRow) -> int:
        """How many last positions of `row.encoded(slot)` are read."""
        ...

    def weight(self, row: PromptRow) -> float:
        """How much a row counts."""
        ...

    def values(self, logits: Tensor, rows: Sequence[PromptRow]) -> Tensor:
        """The loss of each row `[n]`.

        Logits are float32 `[n, at least the largest keep, vocab]`, ending at the last token fed.
        """
        ...


class CrossEntropy:
    """Teacher-forced weighted cross-entropy: sum_t w_t (-log p(y_t | ...)) / sum_t w_t, in nats."""

    def keep(self, row: PromptRow) -> int:
        return len(row.target)

    def weight(self, row: PromptRow) -> float:
        return sum(row.weights)

    def values(self, logits: Tensor, rows: Sequence[PromptRow]) -> Tensor:
        width = max(len(row.target) for row in rows)
        # Rows end in the same column, so targets are padded on the left as well.
        targets = torch.zeros(len(rows), width, dtype=torch.long)
        weights = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            targets[i, width - len(row.target) :] = torch.tensor(row.target)
            weights[i, width - len(row.target) :] = torch.tensor(row.weights)
        targets, weights = targets.to(logits.device), weights.to(logits.device)
        logits = logits[:, logits.shape[1] - width :]
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        nll = logits.logsumexp(-1) - chosen
        return (nll * weights).sum(-1) / weights.sum(-1)


class GapLoss:
    """Minus the gap between two token sets at the first answer position, in raw logits.

    The gap and its aggregators are those of `trimtab.evaluation.readout.gap_of`.
    """

    def __init__(
        self,
        toward: Sequence[int],
        away: Sequence[int],
        sign: int = 1,
        aggregator: str = "logsumexp",
    ) -> None:
        """Take token ids of the behavior and of its opposite; sign +1 raises the gap, -1 lowers it."""
        self.toward, self.away = list(toward), list(away)
        self._tokens = ReadoutTokens(tuple(toward), tuple(away), (), {})
        self.sign, self.aggregator = sign, aggregator

    def keep(self, row: PromptRow) -> int:
        assert not row.target  # the last position is the prompt's
        return 1

    def weight(self, row: PromptRow) -> float:
        return 1.0

    def gaps(self, logits: Tensor) -> Tensor:
        """Return toward minus away of float32 logits `[..., vocab]`."""
        return gap_of(logits, self._tokens, self.aggregator)

    def values(self, logits: Tensor, rows: Sequence[PromptRow]) -> Tensor:
        return -self.sign * self.gaps(logits[:, -1])


@torch.no_grad()
def plain_loss(
    lm: LanguageModel, rows: Sequence[PromptRow], slot: Sequence[int], objective: Objective
) -> float:
    """Return the loss of one slot in the plainest way: a row at a time, no cache, all logits."""
    total, weights = 0.0, 0.0
    for row in rows:
        (batch,) = lm.batches([row.encoded(slot)])
        logits = lm.forward(batch).float()
        weight = objective.weight(row)
        total += weight * float(objective.values(logits, [row])[0].double())
        weights += weight
    return total / weights
