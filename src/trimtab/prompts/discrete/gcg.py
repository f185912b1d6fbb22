"""GCG: greedy coordinate gradient, the published search that HotFlip here is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimtab.prompts.discrete.descent import Descent, Slot, ranked, replaced, seeded
from trimtab.prompts.discrete.walk import Walk
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress
from trimtab.results.journal import Notes


def gcg(
    kernel: Kernel,
    bound: Bound,
    start: Sequence[int],
    *,
    steps: int = 250,
    width: int = 512,
    top_k: int = 256,
    generator: torch.Generator,
    buffer: int = 0,
    journal: Notes | None = None,
    run: str = "gcg",
    progress: Progress | None = None,
) -> Descent:
    """Lower the loss of a slot by greedy coordinate gradient (Zou et al. 2023, 2307.15043).

    A step draws `width` candidates, each a random place whose token becomes a random one of the
    `top_k` of least gradient there, and continues from the best of them, even where that is worse;
    with a buffer, from the best slot of the buffer, which the candidate enters if it beats the
    buffer's worst (nanoGCG). What differs from nanoGCG: tokens are drawn from the allowed ones,
    candidates have to be legal in context and are drawn again until `width` are, no candidate is
    scored twice in a step, and an infeasible start is repaired first.

    `buffer` slots are kept; with 0 it always continues from the newest. All other arguments, and the
    errors, are those of `hotflip`.
    """
    settings = {"steps": steps, "width": width, "top_k": top_k, "buffer": buffer}
    walk = _GCG(kernel, bound, start, generator, journal, run, progress, **settings)
    for _ in walk.rounds():
        walk.go_to_the_best_drawn()
    return walk.descent()


class _GCG(Walk):
    """Goes on from the best slot of the buffer, without one from the newest."""

    method = "gcg"

    def go_to_the_best_drawn(self) -> None:
        """Score `width` random replacements of one token, and go to the best."""
        now = self._leader()
        gradient = self.kernel.gradient(now)[1]
        drawn = _drawn(self.bound, now, gradient, self.top_k, seeded(self.seed, self.step + 1))
        candidates = self.bound.first_legal(drawn, self.width)
        if not candidates:
            self.stop("exhausted")
            return
        self.step += 1
        loss, slot = self.best_of(candidates)[0]
        self.move(slot, loss)
        self.flips += self._leader() == slot
        self.curve.append(self.best_loss)
        self.note("step")

    def move(self, slot: Slot, loss: float) -> None:
        """Offer a slot to the buffer; the first is that of the repaired start."""
        super().move(slot, loss)
        self.buffer.push(loss, slot)

    def _leader(self) -> Slot:
        return self.buffer.entries[0][1] if self.buffer.entries else self.slot


def _drawn(
    bound: Bound, slot: Slot, gradient: Tensor, top_k: int, generator: torch.Generator
) -> Iterator[Slot]:
    """Endless candidates: a random place, a random token of the best there, not the one it has."""
    choices = [
        [token for token in ranked(bound, scores, top_k + 1) if token != slot[place]][:top_k]
        for place, scores in enumerate(gradient)
    ]
    while any(choices):
        place = int(torch.randint(len(slot), (1,), generator=generator))
        if choices[place]:
            pick = int(torch.randint(len(choices[place]), (1,), generator=generator))
            yield replaced(slot, place, choices[place][pick])
