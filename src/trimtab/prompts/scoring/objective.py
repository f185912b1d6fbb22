"""What a prompt search lowers, and the plain loss that every faster way has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import AGGREGATORS, ReadoutTokens, gap_of
from trimtab.prompts.task.rows import Row

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel


class Objective(Protocol):
    """A loss per row, read from the last logits; over rows it is the mean weighted by `weight`."""

    def keep(self, row: Row) -> int:
        """How many last positions of `row.encoded(slot)` are read."""
        ...

    def weight(self, row: Row) -> float:
        """How much a row counts."""
        ...

    def values(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return the loss of each row `[n]`.

        Args:
            logits: float32 `[n, at least the largest keep, vocab]`, ending at the last token fed.
            rows: One per row of logits.
        """
        ...


class CrossEntropy:
    """Teacher-forced weighted cross-entropy: sum_t w_t (-log p(y_t | ...)) / sum_t w_t, in nats."""

    def keep(self, row: Row) -> int:
        """One position per target token.

        Raises:
            TrimtabError: A row without a target.
        """
        if not row.target:
            raise TrimtabError(
                "the cross-entropy of an answer", "a row without a target", "give it an answer"
            )
        return len(row.target)

    def weight(self, row: Row) -> float:
        """The sum of the tokens' weights."""
        return sum(row.weights)

    def values(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return the weighted mean of -log p of each row's target tokens `[n]`."""
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
        """Take the sets.

        Args:
            toward: Token ids of the behavior.
            away: Token ids of its opposite.
            sign: +1 raises the gap, -1 lowers it.
            aggregator: `logsumexp`, `max` or `log_odds`.

        Raises:
            TrimtabError: An empty set or an unknown aggregator.
        """
        choice("aggregator", aggregator, AGGREGATORS)
        if not toward or not away:
            raise TrimtabError(
                f"the gap between {len(toward)} and {len(away)} tokens",
                "an empty set",
                "give tokens on both sides",
            )
        self.toward, self.away = list(toward), list(away)
        self._tokens = ReadoutTokens(tuple(toward), tuple(away), (), {})
        self.sign, self.aggregator = sign, aggregator

    def keep(self, row: Row) -> int:
        """The last position of the prompt.

        Raises:
            TrimtabError: A row with a target, whose last position is not the prompt's.
        """
        if row.target:
            raise TrimtabError(
                "the gap at the first answer position", "a row with a target", "use row.first(0)"
            )
        return 1

    def weight(self, row: Row) -> float:
        """Every row counts alike."""
        return 1.0

    def gaps(self, logits: Tensor) -> Tensor:
        """Return toward minus away of float32 logits `[..., vocab]`."""
        return gap_of(logits, self._tokens, self.aggregator)

    def values(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return -sign * gap of each row `[n]`."""
        return -self.sign * self.gaps(logits[:, -1])


@torch.no_grad()
def plain_loss(
    lm: LanguageModel, rows: Sequence[Row], slot: Sequence[int], objective: Objective
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
