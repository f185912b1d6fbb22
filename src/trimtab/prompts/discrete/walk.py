"""One descent over slots: repair, steps until it stops, a diary that it can be taken up from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from trimtab.prompts.discrete.descent import LEAST_GAIN, Descent, Diary, Meter, Scorer, Slot
from trimtab.prompts.discrete.repair import repair
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress


class Buffer:
    """The best slots scored and not gone on from: at most `size` different ones, the best first.

    Attributes:
        size: How many are kept.
        entries: (loss, ids), ascending; equal losses in the order of the ids.
    """

    def __init__(self, size: int, entries: Iterable[tuple[float, Sequence[int]]] = ()) -> None:
        """Start with some entries."""
        self.size = size
        self.entries: list[tuple[float, tuple[int, ...]]] = []
        for loss, ids in entries:
            self.push(loss, ids)

    def push(self, loss: float, ids: Sequence[int]) -> None:
        """Take a slot in where it is among the best."""
        entry = (float(loss), tuple(ids))
        if all(held != entry[1] for _, held in self.entries):
            self.entries = sorted([*self.entries, entry])[: self.size]

    def pop(
        self, without: Collection[tuple[int, ...]] = ()
    ) -> tuple[float, tuple[int, ...]] | None:
        """Take out the best one that is not in `without`; None where there is none left."""
        for entry in self.entries:
            if entry[1] not in without:
                self.entries.remove(entry)
                return entry
        return None

    def worst(self) -> float:
        """The loss a newcomer has to beat; infinite while there is room."""
        return self.entries[-1][0] if len(self.entries) >= self.size else float("inf")

    def to_list(self) -> list[list[object]]:
        """As JSON: [[loss, [ids]], ...]."""
        return [[loss, list(ids)] for loss, ids in self.entries]


class Walk:
    """What every descent does alike; a subclass makes the steps, and its function the loop.

    An entry of the diary holds all that the next step depends on. Steps that changed nothing need
    not write one: they are done again, or stand in the curve as the loss before them.

    Attributes:
        slot: Where it is, and its `loss`; infinite until the start is legal.
        best: The best slot found, and its `best_loss`.
        curve: The best loss after repair and after each step.
        step: Steps made.
        stopped: Why it stopped; empty while it goes on.
    """

    method: ClassVar[str]

    def __init__(
        self,
        kernel: Scorer,
        bound: Bound,
        start: Slot,
        diary: Diary,
        work: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        """Prepare a walk; `work` holds every setting, `buffer` slots kept to go on from."""
        self.kernel, self.bound, self.diary, self.progress = kernel, bound, diary, progress
        self.start, self.seed, self.steps = start, work["seed"], work["steps"]
        self.top_k, self.width = work["top_k"], work["width"]
        self.meter, self.buffer = Meter(kernel), Buffer(work["buffer"])
        self.repairs = self.flips = self.swaps = self.restarts = self.idle = self.step = 0
        self.slot, self.loss = start, float("inf")
        self.best, self.best_loss = start, float("inf")
        self.left: list[Slot] = []  # never gone to again
        self.curve: list[float] = []
        self.stopped, self.work = "", work
        self.leave()

    def leave(self) -> None:
        """Forget what is true of one slot alone; called at the start and by every move."""

    def move(self, slot: Slot, loss: float) -> None:
        """Go to a slot, and remember it where it is the best."""
        self.slot, self.loss = slot, loss
        self.leave()
        if loss < self.best_loss - LEAST_GAIN:
            self.best, self.best_loss, self.idle = slot, loss, 0

    def stop(self, reason: str) -> None:
        """End here."""
        self.stopped = reason
        self.note("stop")

    def rounds(self) -> Iterator[None]:
        """Take up the diary, or repair; then give way to each step, until it is stopped."""
        self._resume()
        if not self.curve:
            self._repair()
        while not self.stopped:
            if self.step >= self.steps:
                self.stop("steps")
            else:
                yield
            if self.progress is not None:
                self.progress(self.step, self.steps)

    def note(self, event: str) -> None:
        """Write where it stands."""
        begun = bool(self.curve)
        self.diary.add(
            event,
            step=self.step,
            ids=list(self.slot),
            loss=self.loss if begun else None,
            violations=self.bound.violations([self.slot])[0],
            best=list(self.best),
            best_loss=self.best_loss if begun else None,
            seed=self.seed,
            counts=[self.repairs, self.flips, self.swaps, self.restarts, self.idle],
            cost=[self.meter.scored, self.meter.calls],
            buffer=self.buffer.to_list(),
            left=[list(slot) for slot in self.left],
            stopped=self.stopped,
        )

    def _repair(self) -> None:
        for slot in repair(self.meter, self.bound, self.slot, self.top_k, self.seed):
            self.slot = slot
            self.repairs += 1
            self.note("repair")
        self.move(self.slot, self.kernel.one(self.slot))
        self.curve.append(self.best_loss)
        self.note("descend")

    def _resume(self) -> None:
        """Stand where the last entry stood."""
        if not self.diary.entries:
            return
        for entry in self.diary.entries:
            missing = entry["step"] + 1 - len(self.curve)
            if entry["loss"] is not None and missing > 0:
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

    def descent(self) -> Descent:
        """Return where it went."""
        violated = self.bound.explain(self.start)
        return Descent(
            method=self.method,
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
