"""All arms of all restarts; every finished stage comes from the journal or goes into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.prompts.pipeline import baselines, stages
from trimtab.prompts.pipeline.attempt import Attempt
from trimtab.prompts.pipeline.task import Settings, Task
from trimtab.prompts.soft.soft import Soft
from trimtab.results import Progress
from trimtab.results.journal import Notes

PER_RESTART = 4  # attempts: the stages, and random tokens
RIVALS = 3  # more of them where others are compared, GCG aside


@dataclass(frozen=True)
class Found:
    """What the restarts ended with: every attempt, and restart -> soft prefix."""

    attempts: tuple[Attempt, ...]
    softs: Mapping[int, Soft]


def run_restarts(
    engine: Engine, job: Job[Task], journal: Notes | None, progress: Progress | None
) -> Found:
    """Return every attempt in the order of the restarts, which are independent of each other."""
    task = job.here
    notes = _Counted(Notes() if journal is None else journal, task.settings, progress)
    here = _Restart(replace(task, journal=notes), 0)
    first = here.once("reference", lambda: baselines.reference_itself(task))
    rate = here.rate() if task.settings.compare else None
    units = [partial(one_restart, number, rate) for number in range(task.settings.restarts)]
    done = engine.map(job, units, notes=notes)
    attempts = [first, *(attempt for found, _ in done for attempt in found)]
    return Found(tuple(attempts), {number: soft for number, (_, soft) in enumerate(done)})


def one_restart(
    number: int, rate: float | None, task: Task, notes: Notes
) -> tuple[list[Attempt], Soft]:
    """Return the attempts of one restart and its soft prefix.

    Args:
        number: of the restart.
        rate: tokens that one candidate of HotFlip costs; None where nothing is compared.
        task: what is searched.
        notes: where finished stages are taken from and written to.
    """
    return _Restart(replace(task, journal=notes), number).all(rate)


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
    """One restart; each finished stage is taken from the task's journal or written to it."""

    task: Task
    number: int

    def all(self, rate: float | None) -> tuple[list[Attempt], Soft]:
        task, restart = self.task, self.number
        pipeline, soft = self._pipeline()
        null = self.once("random", lambda: baselines.random_tokens(task, restart))
        if rate is None:
            return [*pipeline, null], soft
        before = sum(a.tokens for a in pipeline if a.arm in ("soft", "projected"))
        scored = sum(a.details["scored"] for a in pipeline if a.arm == "repaired")
        return [*pipeline, null, *self._rivals(soft, scored + math.ceil(before / rate))], soft

    def rate(self) -> float:
        """What one candidate of HotFlip costs, in tokens."""
        entry = self._entry("rate")
        if entry is not None:
            return entry["rate"]
        rate = baselines.tokens_per_candidate(self.task)
        self._notes.add({"finished": "rate 0", "rate": rate})
        return rate

    def _pipeline(self) -> tuple[list[Attempt], Soft]:
        task, restart = self.task, self.number
        first, soft = self._soft()
        projected = self.once(
            "projected", lambda: stages.projection_stage(task, restart, soft, "projected")
        )
        steps = task.settings.repair_steps
        repaired = self.once(
            "repaired",
            lambda: stages.descent_stage(task, "repaired", restart, projected.ids, steps),
        )
        return [first, projected, repaired], soft

    def _rivals(self, soft: Soft, budget: int) -> list[Attempt]:
        """The arms that the pipeline is compared with; `budget` is what it is worth, in candidates."""
        task, restart = self.task, self.number
        arms: dict[str, Callable[[], Attempt]] = {
            "nearest": lambda: stages.projection_stage(task, restart, soft, "nearest"),
            "hotflip_random": lambda: baselines.hotflip_random(task, restart, budget),
            "hotflip_reference": lambda: baselines.hotflip_reference(task, restart),
        }
        if restart < task.settings.gcg_restarts:
            arms["gcg"] = lambda: baselines.gcg_random(task, restart)
        return [self.once(arm, work) for arm, work in arms.items()]

    def _soft(self) -> tuple[Attempt, Soft]:
        entry = self._entry("soft")
        if entry is not None:
            return Attempt.from_entry(entry["attempt"]), stages.soft_of(entry["soft"])
        attempt, soft = stages.soft_stage(self.task, self.number)
        self._write(attempt, "soft", soft=stages.soft_entry(soft))
        return attempt, soft

    def once(self, arm: str, work: Callable[[], Attempt]) -> Attempt:
        """Return an arm's attempt, made now where it was not made before."""
        entry = self._entry(arm)
        if entry is not None:
            return Attempt.from_entry(entry["attempt"])
        attempt = work()
        self._write(attempt, arm)
        return attempt

    @property
    def _notes(self) -> Notes:
        assert self.task.journal is not None
        return self.task.journal

    def _entry(self, arm: str) -> dict[str, Any] | None:
        key = f"{arm} {self.number}"
        return next((e for e in self._notes.entries if e.get("finished") == key), None)

    def _write(self, attempt: Attempt, arm: str, **more: Any) -> None:
        entry = {"finished": f"{arm} {self.number}", "attempt": attempt.to_entry(), **more}
        self._notes.add(entry)
