"""One descent over slots: repair, steps until it stops, a journal that it can be taken up from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from trimtab.errors import TrimtabError
from trimtab.prompts.discrete.descent import Descent, Slot
from trimtab.prompts.discrete.repair import repair
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress
from trimtab.results.journal import Notes

# Less is rounding: the same slot in another batch differs by about this much in float32.
LEAST_GAIN = 1e-6


class Buffer:
    """The best slots scored and not gone on from: at most `size` different ones, the best first.

    `entries` are (loss, ids), ascending; equal losses in the order of the ids.
    """

    def __init__(self, size: int, entries: Iterable[tuple[float, Sequence[int]]] = ()) -> None:
        self.size = size
        self.entries: list[tuple[float, Slot]] = []
        for loss, ids in entries:
            self.push(loss, ids)

    def push(self, loss: float, ids: Sequence[int]) -> None:
        """Take a slot in where it is among the best."""
        entry = (float(loss), tuple(ids))
        if all(held != entry[1] for _, held in self.entries):
            self.entries = sorted([*self.entries, entry])[: self.size]

    def pop(self, without: Collection[Slot] = ()) -> tuple[float, Slot] | None:
        """Take out the best one that is not in `without`; None where there is none left."""
        for entry in self.entries:
            if entry[1] not in without:
                self.entries.remove(entry)
                return entry
        return None


class Walk:
    """What every descent does alike; a subclass makes the steps, and its function the loop.

    An entry of the journal holds all that the next step depends on. Steps that changed nothing need
    not write one: they are done again, or stand in the curve as the loss before them.

    Attributes:
        slot: Where it is, and its `loss`; infinite until the start is legal.
        best: The best slot found, and its `best_loss`.
        curve: The best loss after repair and after each step.
        step: Steps made.
        stopped: Why it stopped; empty while it continues.
    """

    method: ClassVar[str]

    def __init__(
        self,
        kernel: Kernel,
        bound: Bound,
        start: Sequence[int],
        generator: torch.Generator,
        journal: Notes | None,
        run: str,
        progress: Progress | None,
        **settings: int,
    ) -> None:
        """Take up what the run wrote into a journal that others may share, or begin.

        `settings` are those of the method, `steps`, `width`, `top_k` and `buffer` among them.

        Raises:
            TrimtabError: The journal holds a run of this name that does other work.
        """
        self.start = tuple(int(token) for token in start)
        # One draw, whatever follows: the caller's next draw does not depend on a resumed descent.
        self.seed = int(torch.randint(2**53, (1,), generator=generator, device=generator.device))
        self.kernel, self.bound, self.progress = kernel, bound, progress
        self.steps, self.width, self.top_k = (settings[n] for n in ("steps", "width", "top_k"))
        self.buffer = Buffer(settings["buffer"])
        self.repairs = self.flips = self.swaps = self.restarts = self.idle = self.step = 0
        self.scored = self._calls_before = 0
        self._calls_before = -self._calls()
        self.slot, self.loss = self.start, float("inf")
        self.best, self.best_loss = self.start, float("inf")
        self.left: list[Slot] = []  # never gone to again
        self.curve: list[float] = []
        self.stopped = ""
        self.leave()
        self._journal, self._run = Notes() if journal is None else journal, run
        work = {"method": self.method, "start": list(self.start), "seed": self.seed, **settings}
        self._take_up({"run": run, "event": "start", **work})

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
        """Repair where that was not done; then give way to each step, until it is stopped."""
        if not self.curve:
            self._repair()
        while not self.stopped:
            if self.step >= self.steps:
                self.stop("steps")
            else:
                yield
            if self.progress is not None:
                self.progress(self.step, self.steps)

    def best_of(
        self, slots: Sequence[Slot], bar: float | None = None, keep: int = 1
    ) -> list[tuple[float, Slot]]:
        """The best candidates as (loss, slot)."""
        self.scored += len(slots)
        found = self.kernel.best(slots, bar=bar, keep=keep) if slots else []
        return [(loss, slots[index]) for index, loss in found]

    def note(self, event: str) -> None:
        """Write where it stands; it is on the disk when this returns."""
        begun = bool(self.curve)
        self._journal.add(
            {
                "run": self._run,
                "event": event,
                "step": self.step,
                "ids": self.slot,
                "loss": self.loss if begun else None,
                "violations": self.bound.violations([self.slot])[0],
                "best": self.best,
                "best_loss": self.best_loss if begun else None,
                "seed": self.seed,
                "counts": [self.repairs, self.flips, self.swaps, self.restarts, self.idle],
                "cost": [self.scored, self._calls()],
                "buffer": self.buffer.entries,
                "left": self.left,
                "stopped": self.stopped,
            }
        )

    def _repair(self) -> None:
        legal = repair(self.kernel, self.best_of, self.bound, self.slot, self.top_k, self.seed)
        for slot in legal:
            self.slot = slot
            self.repairs += 1
            self.note("repair")
        self.move(self.slot, self.kernel.one(self.slot))
        self.curve.append(self.best_loss)
        self.note("descend")

    def _take_up(self, first: dict[str, Any]) -> None:
        """Stand where the last entry of the run stands; write its first one where there is none."""
        entries = [entry for entry in self._journal.entries if entry.get("run") == self._run]
        if not entries:
            self._journal.add(first)
            return
        if entries[0] != first:
            other = [name for name in first if entries[0].get(name) != first[name]]
            raise TrimtabError(
                f"to continue the run {self._run!r} of a journal",
                f"a run with other {', '.join(other) or 'settings'}",
                "give the run another name, or the journal another file",
            )
        for entry in entries[1:]:
            missing = entry["step"] + 1 - len(self.curve)
            if entry["loss"] is not None and missing > 0:
                self.curve += self.curve[-1:] * (missing - 1) + [entry["best_loss"]]
        if len(entries) == 1:
            return
        last = entries[-1]
        self.step, self.stopped = last["step"], last["stopped"]
        self.repairs, self.flips, self.swaps, self.restarts, self.idle = last["counts"]
        self.scored, calls = last["cost"]
        self._calls_before += calls
        self.buffer = Buffer(self.buffer.size, last["buffer"])
        self.left = [tuple(ids) for ids in last["left"]]
        self.slot = tuple(last["ids"])
        if last["loss"] is not None:
            self.loss, self.best_loss = last["loss"], last["best_loss"]
            self.best = tuple(last["best"])

    def _calls(self) -> int:
        """Calls of the model, across interruptions."""
        return self._calls_before + self.kernel.counts.calls + self.kernel.counts.gradients

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
            scored=self.scored,
            model_calls=self._calls(),
            stopped=self.stopped,
        )
