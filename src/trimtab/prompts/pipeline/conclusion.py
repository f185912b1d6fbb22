"""The end of a search: test losses once, the choice by validation, and what the choice is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.prompts.pipeline.attempt import Attempt
from trimtab.prompts.pipeline.report import SearchReport, TextCheck, best_of, summarize
from trimtab.prompts.pipeline.restarts import Restarted
from trimtab.prompts.pipeline.task import SearchTask
from trimtab.prompts.scores import Scorer, Scores, score
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.task.references import ReferencePrompt
from trimtab.prompts.task.requests import SPLITS, Requests
from trimtab.prompts.task.rows import slot_ids
from trimtab.prompts.task.teacher import Teacher
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Switch

SEARCHING = ("repaired", "hotflip_random", "hotflip_reference", "gcg")
# Arms whose chosen prompt gets every score, where arms are compared.
COMPARED = ("soft", "projected", *SEARCHING, "random")


def conclude(
    task: SearchTask,
    reference: ReferencePrompt,
    requests: Requests,
    lesson: Teacher,
    found: Restarted,
    *,
    judge: bool,
    began: float,
) -> SearchReport:
    """Read the test rows once, choose, and score what was chosen.

    With `judge`, answers are generated and judged; `began` is of `time.perf_counter`.
    """
    lm, lever = task.lm, lesson.lever
    attempts = tuple(
        replace(a, test=task.loss(lesson.test, a.ids or found.softs[a.restart]))
        for a in found.attempts
    )
    chosen = best_of([a for a in attempts if a.arm in SEARCHING])
    behavior = reference.behavior(requests) if judge and reference.judge is not None else None
    levers = _levers(task, lever, attempts, found, chosen)
    scorer = Scorer(lm, lever, lesson.test, task.settings.seed)
    return SearchReport(
        model=lm.name,
        fingerprint=lm.fingerprint,
        reference=reference.name,
        reference_text=reference.text,
        reference_ids=task.reference,
        slot=lever.slot,
        separator=lever.separator or "",
        length=task.k,
        banned_words=tuple(task.bound.constraints.words),
        settings=asdict(task.settings),
        requests={s: len(getattr(requests, s)) for s in SPLITS} | {"searched on": len(task.rows)},
        attempts=attempts,
        arms=summarize(attempts),
        chosen=chosen.name,
        chosen_text=chosen.text,
        check=from_text(task, chosen),
        scores=_scores(task, scorer, levers, behavior, reference.side),
        seconds=time.perf_counter() - began,
    )


def from_text(task: SearchTask, attempt: Attempt) -> TextCheck:
    """Render and tokenize a prompt's text in every training row, and take the plain loss."""
    found: list[tuple[int, ...] | None] = []
    for row in task.rows:
        try:
            found.append(slot_ids(task.lm, attempt.text, row))
        except TrimtabError:  # its letters join with what stands around it
            found.append(None)
    same = all(ids == attempt.ids for ids in found)
    read = found[0] if found[0] is not None else attempt.ids
    loss = plain_loss(task.lm, task.rows, read, CrossEntropy())
    return TextCheck(same, attempt.train, loss)


def _levers(
    task: SearchTask,
    reference: PromptSteering,
    attempts: Sequence[Attempt],
    found: Restarted,
    chosen: Attempt,
) -> dict[str, Switch | None]:
    """Name -> lever, of everything that gets every score; equal prompts share their scores."""
    levers: dict[str, Switch | None] = {"chosen": replace(reference, text=chosen.text)}
    for arm in COMPARED if task.settings.compare else ("random",):
        own = [a for a in attempts if a.arm == arm]
        best = best_of(own) if own else None
        if best is not None and arm == "soft":
            soft = found.softs[best.restart]
            levers[arm] = soft.lever(task.lm, reference.slot, reference.separator or "")
        elif best is not None and best.text.strip():
            levers[arm] = replace(reference, text=best.text)
    return levers | {"reference": reference, "no prompt": None}


def _scores(
    task: SearchTask,
    scorer: Scorer,
    levers: dict[str, Switch | None],
    behavior: Behavior | None,
    side: str,
) -> dict[str, Scores]:
    scores: dict[str, Scores] = {}
    known: dict[object, Scores] = {}
    for name, lever in levers.items():
        key = lever.text if isinstance(lever, PromptSteering) and lever.text else name
        if key not in known:
            known[key] = score(
                task.lm,
                lever,
                scorer,
                behavior,
                side=side,
                max_new_tokens=task.settings.answer_tokens,
                seeds=range(task.settings.sampling_seeds),
            )
        scores[name] = known[key]
    return scores
