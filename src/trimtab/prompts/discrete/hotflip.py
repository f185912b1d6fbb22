"""HotFlip: coordinate descent over tokens, candidates by gradient, accepted by their exact loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import torch

from trimtab.prompts.discrete.descent import Descent, Slot, ranked, replaced, seeded
from trimtab.prompts.discrete.walk import LEAST_GAIN, Walk
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress
from trimtab.results.journal import Notes

NEAR = 4  # best replacements of a place that pairs are made of
KEPT = 8  # exact losses wanted of a step
_TRIES = 8


def hotflip(
    kernel: Kernel,
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
    best predicted of every place in turn, and accepts the best if it lowers the loss; the gradient
    is then taken again. Otherwise the next step goes deeper in the ranking. When `top_k`
    replacements of each place have not helped, two tokens are changed at once (pairs of the best
    replacements, and exchanges); when that does not help either, it continues from the best slot
    scored so far that it was not at, or, every second time, from the best of some random changes of
    the best slot.

    Args:
        kernel: Scores slots and gives gradients.
        bound: What a slot may hold. A start that violates it is repaired first, and that is
            reported.
        start: Token ids.
        steps: Most steps, a step being one round of exact scoring; repair is not counted.
        top_k: Replacements of each place, best predicted first, before two are changed at once.
        width: Candidates scored in a step.
        generator: Randomness; one number is drawn.
        swaps: Whether to change two tokens at once.
        buffer: Slots kept to continue from.
        patience: Restarts in a row without a new best slot before it stops.
        journal: Where accepted steps are written; the same call resumes from it and ends in the
            same result. What was tried since the last accepted step is done again.
        run: Name of this descent in a journal that several share.
        progress: Called with (steps done, steps in all).

    Raises:
        TrimtabError: The start cannot be made legal; the journal holds other work.
    """
    settings = {"steps": steps, "width": width, "top_k": top_k, "buffer": buffer}
    settings |= {"swaps": swaps, "patience": patience}
    walk = _HotFlip(kernel, bound, start, generator, journal, run, progress, **settings)
    for _ in walk.rounds():
        if flips := walk.singles():
            walk.flip(flips)
        elif swaps and not walk.swapped and len(walk.slot) > 1:
            walk.swap()
        else:
            walk.restart(patience)
    return walk.descent()


class _HotFlip(Walk):
    """The best predicted replacements, then two tokens at once, then another place to continue from."""

    method = "hotflip"

    def singles(self) -> list[Slot]:
        """The next legal replacements of one token, from where the last step left off."""
        if self.ranking is None:
            self.ranking = self._ranking()
        return self.bound.first_legal(self.ranking, self.width, {self.slot, *self.left})

    def _ranking(self) -> Iterator[Slot]:
        """The best predicted replacement of each place, then the second best of each, ..."""
        gradient = self.kernel.gradient(self.slot)[1].detach().float().cpu()
        changes = gradient - gradient.gather(1, torch.tensor(self.slot)[:, None])
        columns = [ranked(self.bound, place, self.top_k) for place in changes]
        for rank in range(max(map(len, columns))):
            row = [(float(changes[i, c[rank]]), i) for i, c in enumerate(columns) if rank < len(c)]
            for _, i in sorted(row):
                yield replaced(self.slot, i, columns[i][rank])

    def flip(self, candidates: list[Slot]) -> None:
        """Score replacements of one token, and remember the best of each place for `swap`."""
        found = self.best_of(candidates, keep=KEPT)
        for loss, slot in found:
            place = next(i for i, token in enumerate(slot) if token != self.slot[i])
            held = [*self.near.get(place, []), (loss, slot[place])]
            self.near[place] = sorted(held)[:NEAR]
        self.step += 1
        self._take(found, "flip")

    def swap(self) -> None:
        """Pairs of the best replacements of two places, and exchanges of two tokens."""
        slot = self.slot
        wanted = []
        for i, j in combinations(range(len(slot)), 2):
            wanted.append((float("-inf"), replaced(replaced(slot, i, slot[j]), j, slot[i])))
            for (one, a), (other, b) in product(self.near.get(i, []), self.near.get(j, [])):
                # Losses add up to first order, so that sorts the pairs.
                wanted.append((one + other, replaced(replaced(slot, i, a), j, b)))
        wanted.sort()
        pairs = (candidate for _, candidate in wanted)
        candidates = self.bound.first_legal(pairs, 4 * self.width, {slot, *self.left})
        found = self.best_of(candidates, bar=self.loss)
        self.swapped = True
        self.step += 1
        self._take(found, "swap")

    def _take(self, found: list[tuple[float, Slot]], event: str) -> None:
        """Move to the best of what was scored if it is better; keep the others to continue from."""
        better = bool(found) and found[0][0] < self.loss - LEAST_GAIN
        for loss, slot in found[1:] if better else found:
            self.buffer.push(loss, slot)
        if better:
            self.flips += event == "flip"
            self.swaps += event == "swap"
            self.move(found[0][1], found[0][0])
        self.curve.append(self.best_loss)
        if better:
            self.note(event)

    def restart(self, patience: int) -> None:
        """Go on from the buffer, or from random changes of the best slot."""
        self.left.append(self.slot)
        if self.idle >= patience:
            self.stop("patience")
            return
        following = self.buffer.pop(self.left) if self.idle % 2 == 0 else None
        following = following or self._kick() or self.buffer.pop(self.left)
        if following is None:
            self.stop("exhausted")
            return
        self.step += 1
        self.idle += 1
        self.restarts += 1
        self.move(following[1], following[0])
        self.curve.append(self.best_loss)
        self.note("restart")

    def _kick(self) -> tuple[float, Slot] | None:
        """The best of `width` legal slots with random changes of the best one."""
        generator = seeded(self.seed, self.step)
        length = len(self.best)
        fewest, most = min(2, length), max(min(2, length), (length + 1) // 2)

        def drawn() -> Slot:
            changes = int(torch.randint(fewest, most + 1, (1,), generator=generator))
            slot = self.best
            for place in torch.randperm(length, generator=generator)[:changes].tolist():
                pick = int(torch.randint(len(self.bound.pool), (1,), generator=generator))
                slot = replaced(slot, place, int(self.bound.pool[pick]))
            return slot

        kicked = (drawn() for _ in range(_TRIES * self.width))
        candidates = self.bound.first_legal(kicked, self.width, {self.best, *self.left})
        return next(iter(self.best_of(candidates)), None)

    def leave(self) -> None:
        """Rank the replacements of the next slot again."""
        self.near: dict[int, list[tuple[float, int]]] = {}
        self.ranking: Iterator[Slot] | None = None
        self.swapped = False
