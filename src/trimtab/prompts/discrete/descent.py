"""What every descent over slots shares: its scorer, its result, its diary, its candidates."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.prompts.task.constraints import Bound
from trimtab.results.journal import Notes
from trimtab.results.tables import Printable, Table, clean, number

Slot: TypeAlias = "tuple[int, ...]"

# Less is rounding: the same slot in another batch differs by about this much in float32.
LEAST_GAIN = 1e-6
_DEPTH = 16  # times the candidates wanted: how far down a ranking legal ones are looked for


class Counts(Protocol):
    """What a scorer has done so far."""

    @property
    def calls(self) -> int:
        """Calls of the model, gradients aside."""
        ...

    @property
    def gradients(self) -> int:
        """Gradients taken."""
        ...


class Scorer(Protocol):
    """What a descent needs of `trimtab.prompts.scoring.kernel.Kernel`."""

    @property
    def counts(self) -> Counts:
        """What it has done so far."""
        ...

    def one(self, slot: Sequence[int]) -> float:
        """The exact loss of a slot."""
        ...

    def best(
        self, slots: Sequence[Sequence[int]], bar: float | None = None, keep: int = 1
    ) -> list[tuple[int, float]]:
        """Indices and exact losses of the best `keep` below `bar`, ascending."""
        ...

    def gradient(self, slot: Sequence[int]) -> tuple[float, Tensor]:
        """The loss and d loss / d one-hot `[k, vocab]`."""
        ...


@dataclass(frozen=True)
class Descent(Printable):
    """A slot that was made better step by step.

    Attributes:
        method: `hotflip` or `gcg`.
        ids: The best legal slot found.
        text: Its text.
        loss: Its exact loss.
        curve: The best loss after repair and after each step from then on; it never rises.
        violated_start: What the start violated, by kind; empty where it was legal.
        violations_start: The sum of that.
        repair_steps: Replacements made until nothing was violated.
        flips: Accepted replacements of one token.
        swaps: Accepted changes of two tokens at once.
        restarts: Times it went on from the buffer or from a random kick.
        scored: Candidates given to the scorer.
        model_calls: Calls of the model, a gradient counted as one; those of steps that an interruption
            lost are not counted.
        seconds: Of this run alone.
        stopped: Why: `steps`, `patience`, or `exhausted` (no legal candidate left).
    """

    method: str
    ids: Slot
    text: str
    loss: float
    curve: tuple[float, ...]
    violated_start: Mapping[str, int]
    violations_start: int
    repair_steps: int
    flips: int
    swaps: int
    restarts: int
    scored: int
    model_calls: int = field(compare=False)
    seconds: float = field(compare=False)
    stopped: str

    def table(self) -> Table:
        """One row."""
        start = ", ".join(f"{kind} {count}" for kind, count in self.violated_start.items())
        notes = (f"the start violated: {start}; {self.repair_steps} steps of repair",)
        return Table(
            title=f"{self.method}: {clean(self.text)}",
            columns=("loss", "from", "flips", "swaps", "restarts", "scored", "calls", "stopped"),
            rows=(
                (
                    number(self.loss, 4),
                    number(self.curve[0], 4),
                    str(self.flips),
                    str(self.swaps),
                    str(self.restarts),
                    str(self.scored),
                    str(self.model_calls),
                    self.stopped,
                ),
            ),
            notes=notes if start else (),
        )


class Diary:
    """One run's part of a journal; several runs may share the file.

    Attributes:
        entries: What this run wrote, its first line aside.
    """

    def __init__(self, journal: Notes | None, run: str, work: Mapping[str, Any]) -> None:
        """Take up what the run wrote, or begin.

        Raises:
            TrimtabError: The journal holds a run of this name that does other work.
        """
        self._journal, self._run = journal, run
        found = [] if journal is None else [e for e in journal.entries if e.get("run") == run]
        first = {"run": run, "event": "start", **work}
        if not found:
            self._add(first)
        elif found[0] != first:
            other = [name for name in first if found[0].get(name) != first[name]]
            raise TrimtabError(
                f"to go on with the run {run!r} of a journal",
                f"a run with other {', '.join(other) or 'settings'}",
                "give the run another name, or the journal another file",
            )
        self.entries: list[dict[str, Any]] = found[1:]

    def add(self, event: str, **state: Any) -> None:
        """Write one step; it is on the disk when this returns."""
        self._add({"run": self._run, "event": event, **state})

    def _add(self, entry: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.add(entry)


class Meter:
    """Counts what a descent costs, across interruptions."""

    def __init__(self, scorer: Scorer, scored: int = 0, calls: int = 0) -> None:
        """Start from what the diary says."""
        self.scorer, self.scored = scorer, scored
        self._before, self._first = calls, _calls(scorer)
        self._began = time.perf_counter()

    @property
    def calls(self) -> int:
        """Calls of the model."""
        return self._before + _calls(self.scorer) - self._first

    @property
    def seconds(self) -> float:
        """Since this run began or was taken up."""
        return time.perf_counter() - self._began

    def best(
        self, slots: Sequence[Slot], bar: float | None = None, keep: int = 1
    ) -> list[tuple[float, Slot]]:
        """The best candidates as (loss, slot)."""
        self.scored += len(slots)
        found = self.scorer.best(slots, bar=bar, keep=keep) if slots else []
        return [(loss, slots[index]) for index, loss in found]


def _calls(scorer: Scorer) -> int:
    return scorer.counts.calls + scorer.counts.gradients


def seeded(seed: int, key: object) -> torch.Generator:
    """The generator of one step: a function of both, so that no running state has to be kept."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw_seed(generator: torch.Generator) -> int:
    """One draw, whatever follows: the caller's next draw does not depend on a resumed descent."""
    return int(torch.randint(2**53, (1,), generator=generator, device=generator.device))


def replaced(slot: Slot, position: int, token: int) -> Slot:
    """The slot with another token at a position."""
    return (*slot[:position], token, *slot[position + 1 :])


def ranked(bound: Bound, scores: Tensor, count: int) -> list[int]:
    """Allowed tokens of lowest score `[vocab]`, at most `count`, best first."""
    masked = scores.detach().cpu().masked_fill(~bound.allowed[: len(scores)], float("inf"))
    count = min(count, int(bound.allowed[: len(scores)].sum()))
    return masked.topk(count, largest=False).indices.tolist()


def legal_of(
    bound: Bound, candidates: Iterable[Slot], count: int, without: Collection[Slot] = ()
) -> list[Slot]:
    """The first `count` legal candidates of an order: what is filtered out is refilled from below.

    Looks at no more than 16 times `count`.
    """
    found: list[Slot] = []
    source, seen = iter(candidates), set(without)
    for chunk in _chunks(source, count, _DEPTH):
        new = [slot for slot in dict.fromkeys(chunk) if slot not in seen]
        seen.update(new)
        found += [slot for slot, fine in zip(new, bound.legal(new), strict=True) if fine]
        if len(found) >= count:
            break
    return found[:count]


def _chunks(source: Iterator[Slot], size: int, times: int) -> Iterator[list[Slot]]:
    for _ in range(times):
        chunk = list(islice(source, size))
        if not chunk:
            return
        yield chunk


def checked_start(bound: Bound, start: Sequence[int]) -> Slot:
    """The start as a slot of known tokens.

    Raises:
        TrimtabError: It is empty, or holds what is no token of the model.
    """
    slot = tuple(int(token) for token in start)
    wrong = [token for token in slot if not 0 <= token < len(bound.allowed)]
    if not slot or wrong:
        raise TrimtabError(
            f"a descent from {list(slot)}",
            f"no token {wrong[0]} in the model" if wrong else "no tokens",
            "give one token id or more",
        )
    return slot
