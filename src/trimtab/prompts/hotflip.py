"""HotFlip: coordinate descent over tokens, candidates by gradient, accepted by their exact loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch

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

NEAR = 4  # best replacements of a place that pairs are made of
KEPT = 8  # exact losses wanted of a step
_TRIES = 8


def hotflip(
    kernel: Scorer,
    bound: Bound,
    start: Sequence[int],
    *,
    steps: int = 200,
    top_k: int = 64,
    width: int = 64,
    generator: torch.Generator,
    swaps: bool = True,
    buffer: int = 8,
    patience: int = 4,
    journal: Notes | None = None,
    run: str = "hotflip",
    progress: Progress | None = None,
) -> Descent:
    """Lower the loss of a slot by replacing tokens, after Ebrahimi et al. 2018 (1712.06751).

    To first order, replacing token a by b at place i changes the loss by g[i, b] - g[i, a], g the
    gradient to the one-hot rows `[k, vocab]`. A step scores `width` legal replacements exactly, the
    best foretold of every place in turn, and accepts the best if it lowers the loss; the gradient
    is then taken anew. Otherwise the next step goes deeper in the ranking. When `top_k`
    replacements of each place have not helped, two tokens are changed at once (pairs of the best
    replacements, and exchanges); when that does not help either, it goes on from the best slot
    scored so far that it was not at, or, every second time, from the best of some random changes of
    the best slot.

    Args:
        kernel: Scores slots and gives gradients.
        bound: What a slot may hold. A start that violates it is repaired first, and that is
            reported.
        start: Token ids.
        steps: Most steps, a step being one round of exact scoring; repair is not counted.
        top_k: Replacements of each place, best foretold first, before two are changed at once.
        width: Candidates scored in a step.
        generator: Randomness; one number is drawn.
        swaps: Whether to change two tokens at once.
        buffer: Slots kept to go on from.
        patience: Restarts in a row without a new best slot before it stops.
        journal: Where accepted steps are written; the same call resumes from it and ends in the
            same result. What was tried since the last accepted step is done again.
        run: Name of this descent in a journal that several share.
        progress: Called with (steps done, steps in all).

    Raises:
        TrimtabError: The start cannot be made legal; the journal holds other work.
    """
    slot = checked_start(bound, start)
    seed = draw_seed(generator)
    work = {
        "method": "hotflip",
        "start": list(slot),
        "seed": seed,
        "steps": steps,
        "top_k": top_k,
        "width": width,
        "swaps": swaps,
        "buffer": buffer,
        "patience": patience,
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
        self.start, self.seed, self.steps = start, work["seed"], work["steps"]
        self.top_k, self.width = work["top_k"], work["width"]
        self.swapping, self.patience = work["swaps"], work["patience"]
        self.meter = Meter(kernel)
        self.buffer = Buffer(work["buffer"])
        self.left: list[Slot] = []  # local optima: never gone to again
        self.repairs = self.flips = self.swaps = self.restarts = self.idle = self.step = 0
        self.slot, self.loss = start, float("inf")
        self.best, self.best_loss = start, float("inf")
        self.curve: list[float] = []
        self.stopped = ""
        self._clear()

    def run(self) -> Descent:
        """Repair, descend, report."""
        self._resume()
        self._repair()
        while not self.stopped:
            if self.step >= self.steps:
                self._stop("steps")
            elif flips := self._singles():
                self._flip(flips)
            elif self.swapping and not self.swapped and len(self.slot) > 1:
                self._swap()
            else:
                self._restart()
            if self.progress is not None:
                self.progress(self.step, self.steps)
        violated = self.bound.explain(self.start)
        return Descent(
            method="hotflip",
            ids=self.best,
            text=self.bound.text(self.best),
            loss=self.best_loss,
            curve=tuple(self.curve),
            violated_start=violated,
            violations_start=sum(violated.values()),
            repair_steps=self.repairs,
            flips=self.flips,
            swaps=self.swaps,
            restarts=self.restarts,
            scored=self.meter.scored,
            model_calls=self.meter.calls,
            seconds=self.meter.seconds,
            stopped=self.stopped,
        )

    def _repair(self) -> None:
        if self.curve:
            return
        for slot in repair(self.meter, self.bound, self.slot, self.top_k, self.seed):
            self.slot = slot
            self.repairs += 1
            self._note("repair")
        self._move(self.slot, self.kernel.one(self.slot))
        self.curve.append(self.best_loss)
        self._note("descend")

    def _singles(self) -> list[Slot]:
        """The next legal replacements of one token, from where the last step left off."""
        if self.ranking is None:
            self.ranking = self._ranking()
        return legal_of(self.bound, self.ranking, self.width, without={self.slot, *self.left})

    def _ranking(self) -> Iterator[Slot]:
        """The best foretold replacement of each place, then the second best of each, ..."""
        gradient = self.kernel.gradient(self.slot)[1].detach().float().cpu()
        changes = gradient - gradient.gather(1, torch.tensor(self.slot)[:, None])
        columns = [ranked(self.bound, place, self.top_k) for place in changes]
        for rank in range(max(map(len, columns))):
            row = [(float(changes[i, c[rank]]), i) for i, c in enumerate(columns) if rank < len(c)]
            for _, i in sorted(row):
                yield replaced(self.slot, i, columns[i][rank])

    def _flip(self, candidates: list[Slot]) -> None:
        found = self.meter.best(candidates, keep=KEPT)
        for loss, slot in found:
            place = next(i for i, token in enumerate(slot) if token != self.slot[i])
            held = [*self.near.get(place, []), (loss, slot[place])]
            self.near[place] = sorted(held)[:NEAR]
        self.step += 1
        self._take(found, "flip")

    def _swap(self) -> None:
        """Pairs of the best replacements of two places, and exchanges of two tokens."""
        slot = self.slot
        wanted = []
        for i, j in combinations(range(len(slot)), 2):
            wanted.append((float("-inf"), replaced(replaced(slot, i, slot[j]), j, slot[i])))
            for (one, a), (other, b) in product(self.near.get(i, []), self.near.get(j, [])):
                # Losses add up to first order, so that sorts the pairs.
                wanted.append((one + other, replaced(replaced(slot, i, a), j, b)))
        wanted.sort()
        candidates = legal_of(
            self.bound,
            (candidate for _, candidate in wanted),
            4 * self.width,
            without={slot, *self.left},
        )
        found = self.meter.best(candidates, bar=self.loss)
        self.swapped = True
        self.step += 1
        self._take(found, "swap")

    def _take(self, found: list[tuple[float, Slot]], event: str) -> None:
        """Move to the best of what was scored if it is better; keep the others to go on from."""
        better = bool(found) and found[0][0] < self.loss - LEAST_GAIN
        for loss, slot in found[1:] if better else found:
            self.buffer.push(loss, slot)
        if better:
            self.flips += event == "flip"
            self.swaps += event == "swap"
            self._move(found[0][1], found[0][0])
        self.curve.append(self.best_loss)
        if better:
            self._note(event)

    def _restart(self) -> None:
        """Go on from the buffer, or from random changes of the best slot."""
        self.left.append(self.slot)
        if self.idle >= self.patience:
            self._stop("patience")
            return
        following = self.buffer.pop(self.left) if self.idle % 2 == 0 else None
        following = following or self._kick() or self.buffer.pop(self.left)
        if following is None:
            self._stop("exhausted")
            return
        self.step += 1
        self.idle += 1
        self.restarts += 1
        self._move(following[1], following[0])
        self.curve.append(self.best_loss)
        self._note("restart")

    def _kick(self) -> tuple[float, Slot] | None:
        """The best of `width` legal slots with random changes of the best one."""
        generator = seeded(self.seed, self.step)
        tokens = self.bound.allowed.nonzero()[:, 0]
        length = len(self.best)
        fewest, most = min(2, length), max(min(2, length), (length + 1) // 2)

        def drawn() -> Slot:
            changes = int(torch.randint(fewest, most + 1, (1,), generator=generator))
            slot = self.best
            for place in torch.randperm(length, generator=generator)[:changes].tolist():
                pick = int(torch.randint(len(tokens), (1,), generator=generator))
                slot = replaced(slot, place, int(tokens[pick]))
            return slot

        candidates = legal_of(
            self.bound,
            (drawn() for _ in range(_TRIES * self.width)),
            self.width,
            without={self.best, *self.left},
        )
        return next(iter(self.meter.best(candidates)), None)

    def _move(self, slot: Slot, loss: float) -> None:
        self.slot, self.loss = slot, loss
        self._clear()
        if loss < self.best_loss - LEAST_GAIN:
            self.best, self.best_loss, self.idle = slot, loss, 0

    def _clear(self) -> None:
        """Forget what was true of the slot left."""
        self.near: dict[int, list[tuple[float, int]]] = {}
        self.ranking: Iterator[Slot] | None = None
        self.swapped = False

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._note("stop")

    def _note(self, event: str) -> None:
        self.diary.add(
            event,
            step=self.step,
            ids=list(self.slot),
            loss=self.loss if self.curve else None,
            violations=self.bound.violations([self.slot])[0],
            best=list(self.best),
            best_loss=self.best_loss if self.curve else None,
            seed=self.seed,
            counts=[self.repairs, self.flips, self.swaps, self.restarts, self.idle],
            cost=[self.meter.scored, self.meter.calls],
            buffer=self.buffer.to_list(),
            left=[list(slot) for slot in self.left],
            stopped=self.stopped,
        )

    def _resume(self) -> None:
        """Stand where the last entry stood."""
        if not self.diary.entries:
            return
        for entry in self.diary.entries:
            missing = entry["step"] + 1 - len(self.curve)
            if entry["loss"] is not None and missing > 0:
                # Steps that changed nothing wrote nothing.
                self.curve += self.curve[-1:] * (missing - 1) + [entry["best_loss"]]
        last = self.diary.entries[-1]
        self.step, self.stopped = last["step"], last["stopped"]
        self.repairs, self.flips, self.swaps, self.restarts, self.idle = last["counts"]
        self.meter = Meter(self.kernel, *last["cost"])
        self.buffer = Buffer(self.buffer.size, ((loss, ids) for loss, ids in last["buffer"]))
        self.left = [tuple(ids) for ids in last["left"]]
        self.slot = tuple(last["ids"])
        if last["loss"] is not None:
            self.loss, self.best_loss = last["loss"], last["best_loss"]
            self.best = tuple(last["best"])
