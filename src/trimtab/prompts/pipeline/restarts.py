"""All arms of all restarts; every finished stage comes from the journal or goes into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trimtab.prompts.pipeline import baselines, stages
from trimtab.prompts.pipeline.attempt import Attempt
from trimtab.prompts.pipeline.task import Task
from trimtab.prompts.soft import Soft

Progress: TypeAlias = "Callable[[int, int], None]"
PER_RESTART = 7  # attempts, GCG aside


@dataclass(frozen=True)
class Found:
    """What the restarts ended with: every attempt, and restart -> soft prefix."""

    attempts: tuple[Attempt, ...]
    softs: Mapping[int, Soft]


@dataclass
class Restarts:
    """All arms of all restarts, each finished stage taken from the journal or written to it."""

    task: Task
    progress: Progress | None
    done: int = field(default=0, init=False)

    def all(self) -> Found:
        """Return every attempt in the order of the restarts."""
        found = [self._once("reference", 0, lambda: baselines.reference_itself(self.task))]
        softs: dict[int, Soft] = {}
        for restart in range(self.task.settings.restarts):
            pipeline, softs[restart] = self._pipeline(restart)
            found += pipeline
            found += self._baselines(restart, self._worth(pipeline))
        return Found(tuple(found), softs)

    def _worth(self, pipeline: Sequence[Attempt]) -> int:
        """How many candidates of HotFlip the pipeline's stages of one restart are worth."""
        entry = self._entry("rate", 0)
        rate = baselines.tokens_per_candidate(self.task) if entry is None else entry["rate"]
        if entry is None and self.task.journal is not None:
            self.task.journal.add({"finished": "rate 0", "rate": rate})
        before = sum(a.tokens for a in pipeline if a.arm in ("soft", "projected"))
        scored = sum(a.details["scored"] for a in pipeline if a.arm == "repaired")
        return scored + math.ceil(before / rate)

    def _pipeline(self, restart: int) -> tuple[list[Attempt], Soft]:
        task = self.task
        first, soft = self._soft(restart)
        projected, nearest = (
            self._once(
                arm, restart, lambda arm=arm: stages.projection_stage(task, restart, soft, arm)
            )
            for arm in ("projected", "nearest")
        )
        steps = task.settings.repair_steps
        repaired = self._once(
            "repaired",
            restart,
            lambda: stages.descent_stage(task, "repaired", restart, projected.ids, steps),
        )
        return [first, projected, repaired, nearest], soft

    def _baselines(self, restart: int, budget: int) -> list[Attempt]:
        task, listed = self.task, []
        arms: dict[str, Callable[[], Attempt]] = {
            "hotflip_random": lambda: baselines.hotflip_random(task, restart, budget),
            "hotflip_reference": lambda: baselines.hotflip_reference(task, restart),
            "random": lambda: baselines.random_tokens(task, restart),
        }
        if restart < task.settings.gcg_restarts:
            arms["gcg"] = lambda: baselines.gcg_random(task, restart)
        for arm, work in arms.items():
            listed.append(self._once(arm, restart, work))
        return listed

    def _soft(self, restart: int) -> tuple[Attempt, Soft]:
        entry = self._entry("soft", restart)
        if entry is not None:
            self._tick()
            return Attempt.from_entry(entry["attempt"]), stages.soft_of(entry["soft"])
        attempt, soft = stages.soft_stage(self.task, restart)
        self._write("soft", restart, attempt, soft=stages.soft_entry(soft))
        return attempt, soft

    def _once(self, arm: str, restart: int, work: Callable[[], Attempt]) -> Attempt:
        entry = self._entry(arm, restart)
        if entry is not None:
            self._tick()
            return Attempt.from_entry(entry["attempt"])
        attempt = work()
        self._write(arm, restart, attempt)
        return attempt

    def _entry(self, arm: str, restart: int) -> dict[str, Any] | None:
        entries = [] if self.task.journal is None else self.task.journal.entries
        key = f"{arm} {restart}"
        return next((entry for entry in entries if entry.get("finished") == key), None)

    def _write(self, arm: str, restart: int, attempt: Attempt, **more: Any) -> None:
        if self.task.journal is not None:
            entry = {"finished": f"{arm} {restart}", "attempt": attempt.to_entry(), **more}
            self.task.journal.add(entry)
        self._tick()

    def _tick(self) -> None:
        settings = self.task.settings
        total = 1 + 7 * settings.restarts + min(settings.gcg_restarts, settings.restarts)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, total)
