"""A scorer of slots without any of the kernel's savings: what the descents are tested on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.models.model import LanguageModel
from trimtab.prompts.scoring.kernel import Counts, Kernel
from trimtab.prompts.scoring.objective import CrossEntropy
from trimtab.prompts.soft.embeddings import onehot_gradient
from trimtab.prompts.task.rows import PromptRow


class PlainScorer(Kernel):
    """All candidates of one length on all rows, in one batch, every time."""

    def __init__(self, lm: LanguageModel, rows: Sequence[PromptRow]) -> None:
        self.lm, self.rows, self.objective = lm, tuple(rows), CrossEntropy()
        self.counts = Counts()

    @torch.no_grad()
    def losses(self, slots: Sequence[Sequence[int]]) -> Tensor:
        encoded = [row.encoded(slot) for slot in slots for row in self.rows]
        laid = [row for _ in slots for row in self.rows]
        keep = max(len(row.target) for row in laid)
        values = torch.zeros(len(laid), dtype=torch.float64)
        for batch in self.lm.batches(encoded, 1 << 15, 1 << 10):
            self.counts = self.counts.plus(calls=1)
            logits = self.lm.forward(batch, keep).float()
            chosen = [laid[i] for i in batch.rows.tolist()]
            values[batch.rows] = self.objective.values(logits, chosen).double()
        weights = torch.tensor([self.objective.weight(row) for row in self.rows]).double()
        return values.view(len(slots), -1) @ weights / weights.sum()

    def one(self, slot: Sequence[int]) -> float:
        return float(self.losses([slot])[0])

    def best(
        self, slots: Sequence[Sequence[int]], bar: float | None = None, keep: int = 1
    ) -> list[tuple[int, float]]:
        losses = self.losses(slots).tolist()
        order = sorted(range(len(slots)), key=losses.__getitem__)[:keep]
        return [(i, losses[i]) for i in order if bar is None or losses[i] < bar]

    def gradient(self, slot: Sequence[int]) -> tuple[float, Tensor]:
        self.counts = self.counts.plus(gradients=1)
        return onehot_gradient(self.lm, self.rows, slot, self.objective)
