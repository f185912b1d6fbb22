"""All arms of all restarts; every finished stage comes from the journal or goes into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.prompts.pipeline import stages
from trimtab.prompts.pipeline.attempt import Attempt
from trimtab.prompts.pipeline.task import SearchTask, Settings
from trimtab.prompts.soft.soft import Soft
from trimtab.results import Progress
from trimtab.results.journal import Notes

PER_RESTART = 4  # attempts: the stages, and random tokens
RIVALS = 3  # more of them where others are compared, GCG aside


@dataclass(frozen=True)
class Restarted:
    """What the restarts ended with: every attempt, and restart -> soft prefix."""

    attempts: tuple[Attempt, ...]
    softs: Mapping[int, Soft]


def run_restarts(
    engine: Engine, job: Job[SearchTask], journal: Notes | None, progress: Progress | None
) -> Restarted:
    """Return every attempt in the order of the restarts, which are independent of each other."""
    notes = _Counted(Notes() if journal is None else journal, job.here.settings, progress)
    here = _Restart(replace(job.here, journal=notes), 0, notes)
    first = here.once("reference", partial(stages.reference_itself, here.task))
    rate = here.rate() if here.task.settings.compare else None
    units = [partial(one_restart, n, rate) for n in range(here.task.settings.restarts)]
    done = engine.map(job, units, notes=notes)
    attempts = [first, *(attempt for found, _ in done for attempt in found)]
    return Restarted(tuple(attempts), {number: soft for number, (_, soft) in enumerate(done)})


def one_restart(
    number: int, rate: float | None, task: SearchTask, notes: Notes
) -> tuple[list[Attempt], Soft]:
    """Return the attempts of one restart and its soft prefix; finished stages come from the notes.

    `rate` is what one candidate of HotFlip costs, in tokens; None where nothing is compared.
    """
    task, settings = replace(task, journal=notes), task.settings
    here = _Restart(task, number, notes)
    first, soft = here.soft()
    once, projection, descent = here.once, stages.projection_stage, stages.descent_stage
    projected = once("projected", partial(projection, task, number, soft, "projected"))
    start, steps = projected.ids, settings.repair_steps
    repaired = once("repaired", partial(descent, task, "repaired", number, start, steps))
    null = once("random", partial(stages.random_tokens, task, number))
    found = [first, projected, repaired, null]
    if rate is None:
        return found, soft
    # What the pipeline is worth, in candidates.
    budget = repaired.details["scored"] + math.ceil((first.tokens + projected.tokens) / rate)
    rivals: dict[str, Callable[[], Attempt]] = {
        "nearest": partial(projection, task, number, soft, "nearest"),
        "hotflip_random": partial(stages.hotflip_random, task, number, budget),
        "hotflip_reference": partial(stages.hotflip_reference, task, number),
    }
    if number < settings.gcg_restarts:
        rivals["gcg"] = partial(stages.gcg_random, task, number)
    return [*found, *(once(arm, work) for arm, work in rivals.items())], soft


class _Counted(Notes):
    """A journal that tells how many of all attempts are in it."""

    def __init__(self, journal: Notes, settings: Settings, progress: Progress | None) -> None:
        self.entries, self._journal, self._progress = journal.entries, journal, progress
        self._total = 1 + PER_RESTART * settings.restarts
        if settings.compare:
            self._total += RIVALS * settings.restarts
            self._total += min(settings.gcg_restarts, settings.restarts)
        self._tell()

    def add(self, entry: Mapping[str, Any]) -> None:
        self._journal.add(entry)
        if "attempt" in entry:
            self._tell()

    def _tell(self) -> None:
        done = sum("attempt" in entry for entry in self.entries)
        if self._progress is not None and done:
            self._progress(min(done, self._total), self._total)


@dataclass(frozen=True)
class _Restart:
    """One restart; each finished stage is taken from the notes or written to them."""

    task: SearchTask
    number: int
    notes: Notes

    def rate(self) -> float:
        """What one candidate of HotFlip costs, in tokens."""
        entry = self._entry("rate")
        if entry is not None:
            return entry["rate"]
        rate = stages.tokens_per_candidate(self.task)
        self.notes.add({"finished": "rate 0", "rate": rate})
        return rate

    def soft(self) -> tuple[Attempt, Soft]:
        """The first stage."""
        entry = self._entry("soft")
        if entry is not None:
            return _attempt(entry), stages.soft_of(entry["soft"])
        attempt, soft = stages.soft_stage(self.task, self.number)
        self._write(attempt, "soft", soft=stages.soft_entry(soft))
        return attempt, soft

    def once(self, arm: str, work: Callable[[], Attempt]) -> Attempt:
        """An arm's attempt, made now where it was not made before."""
        entry = self._entry(arm)
        if entry is not None:
            return _attempt(entry)
        attempt = work()
        self._write(attempt, arm)
        return attempt

    def _entry(self, arm: str) -> dict[str, Any] | None:
        key = f"{arm} {self.number}"
        return next((e for e in self.notes.entries if e.get("finished") == key), None)

    def _write(self, attempt: Attempt, arm: str, **more: Any) -> None:
        finished = f"{arm} {self.number}"
        self.notes.add({"finished": finished, "attempt": asdict(attempt), **more})


def _attempt(entry: Mapping[str, Any]) -> Attempt:
    held = entry["attempt"]
    return Attempt(**{**held, "ids": tuple(held["ids"])})
