"""GCG: greedy coordinate gradient, the published search that HotFlip here is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from trimtab.prompts.discrete.descent import (
    Descent,
    Diary,
    Scorer,
    Slot,
    checked_start,
    draw_seed,
    legal_of,
    ranked,
    replaced,
    seeded,
)
from trimtab.prompts.discrete.walk import Walk
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress
from trimtab.results.journal import Notes

_REFILL = 16


def gcg(
    kernel: Scorer,
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
    `top_k` of least gradient there, and goes on from the best of them, even where that is worse;
    with a buffer, from the best slot of the buffer, which the candidate enters if it beats the
    buffer's worst (nanoGCG). What differs from nanoGCG: tokens are drawn from the allowed ones,
    candidates have to be legal in context and are drawn again until `width` are, no candidate is
    scored twice in a step, and an infeasible start is repaired first.

    Args:
        kernel: Scores slots and gives gradients.
        bound: What a slot may hold.
        start: Token ids.
        steps: How many steps.
        width: Candidates a step.
        top_k: Tokens a place to draw from.
        generator: Randomness; one number is drawn.
        buffer: Slots kept; 0 always goes on from the newest.
        journal: Where steps are written; the same call resumes from it.
        run: Name of this descent in a journal that several share.
        progress: Called with (steps done, steps in all).

    Raises:
        TrimtabError: The start cannot be made legal; the journal holds other work.
    """
    slot = checked_start(bound, start)
    work = {
        "method": "gcg",
        "start": list(slot),
        "seed": draw_seed(generator),
        "steps": steps,
        "width": width,
        "top_k": top_k,
        "buffer": buffer,
    }
    walk = _GCG(kernel, bound, slot, Diary(journal, run, work), work, progress)
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
        candidates = legal_of(self.bound, islice(drawn, _REFILL * self.width), self.width)
        if not candidates:
            self.stop("exhausted")
            return
        self.step += 1
        loss, slot = self.meter.best(candidates)[0]
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
