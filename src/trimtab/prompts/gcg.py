"""GCG: greedy coordinate gradient, the published search that HotFlip here is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trimtab.journal import Notes
from trimtab.prompts.constraints import Bound
from trimtab.prompts.moves.buffer import Buffer
from trimtab.prompts.moves.descent import (
    LEAST_GAIN,
    Descent,
    Diary,
    Meter,
    Progress,
    Scorer,
    Slot,
    checked_start,
    draw_seed,
    legal_of,
    ranked,
    replaced,
    seeded,
)
from trimtab.prompts.moves.repair import repair

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
    return _Walk(kernel, bound, slot, Diary(journal, run, work), work, progress).run()


class _Walk:
    """One descent; what an entry of the diary holds is all that the next step depends on."""

    def __init__(
        self,
        kernel: Scorer,
        bound: Bound,
        start: Slot,
        diary: Diary,
        work: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.kernel, self.bound, self.diary, self.progress = kernel, bound, diary, progress
        self.start, self.work, self.seed = start, work, work["seed"]
        self.meter = Meter(kernel)
        self.buffer = Buffer(max(1, work["buffer"]))
        self.slot = self.best = start
        self.repairs = self.flips = 0
        self.curve: list[float] = []
        self.stopped = ""

    def run(self) -> Descent:
        """Repair, descend, report."""
        self._resume()
        if not self.curve:
            self._repair()
        while not self.stopped:
            if len(self.curve) > self.work["steps"]:
                self._stop("steps")
            else:
                self._step()
            if self.progress is not None:
                self.progress(len(self.curve) - 1, self.work["steps"])
        violated = self.bound.explain(self.start)
        return Descent(
            method="gcg",
            ids=self.best,
            text=self.bound.text(self.best),
            loss=self.curve[-1],
            curve=tuple(self.curve),
            violated_start=violated,
            violations_start=sum(violated.values()),
            repair_steps=self.repairs,
            flips=self.flips,
            swaps=0,
            restarts=0,
            scored=self.meter.scored,
            model_calls=self.meter.calls,
            seconds=self.meter.seconds,
            stopped=self.stopped,
        )

    def _repair(self) -> None:
        for slot in repair(self.meter, self.bound, self.slot, self.work["top_k"], self.seed):
            self.slot = slot
            self.repairs += 1
            self._note("repair")
        self.best = self.slot
        self.curve.append(self.kernel.one(self.slot))
        self.buffer.push(self.curve[0], self.slot)
        self._note("descend")

    def _step(self) -> None:
        now, width = self.buffer.entries[0][1], self.work["width"]
        drawn = _drawn(
            self.bound,
            now,
            self.kernel.gradient(now)[1],
            self.work["top_k"],
            seeded(self.seed, len(self.curve)),
        )
        candidates = legal_of(self.bound, islice(drawn, _REFILL * width), width)
        if not candidates:
            self._stop("exhausted")
            return
        loss, self.slot = self.meter.best(candidates)[0]
        if self.work["buffer"] == 0:
            self.buffer = Buffer(1)
        self.buffer.push(loss, self.slot)
        self.flips += self.buffer.entries[0][1] == self.slot
        better = loss < self.curve[-1] - LEAST_GAIN
        if better:
            self.best = self.slot
        self.curve.append(loss if better else self.curve[-1])
        self._note("step")

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._note("stop")

    def _note(self, event: str) -> None:
        self.diary.add(
            event,
            step=max(0, len(self.curve) - 1),
            ids=list(self.slot),
            loss=self.buffer.entries[0][0] if self.curve else None,
            violations=self.bound.violations([self.slot])[0],
            best=list(self.best),
            best_loss=self.curve[-1] if self.curve else None,
            seed=self.seed,
            counts=[self.repairs, self.flips],
            cost=[self.meter.scored, self.meter.calls],
            buffer=self.buffer.to_list(),
            stopped=self.stopped,
        )

    def _resume(self) -> None:
        """Stand where the last entry stood."""
        if not self.diary.entries:
            return
        for entry in self.diary.entries:
            if entry["event"] in ("descend", "step"):
                self.curve.append(entry["best_loss"])
        last = self.diary.entries[-1]
        self.slot, self.best = tuple(last["ids"]), tuple(last["best"])
        self.repairs, self.flips = last["counts"]
        self.meter = Meter(self.kernel, *last["cost"])
        self.buffer = Buffer(self.buffer.size, ((loss, ids) for loss, ids in last["buffer"]))
        self.stopped = last["stopped"]


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
