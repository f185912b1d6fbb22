"""Search for a prompt that does what a reference prompt does, in other words (docs/search.md).

Per restart: a soft prefix, its projection to allowed tokens, repair by HotFlip; with `compare` beside
it the baselines with at least as many tokens fed to the model. Validation requests choose a restart;
the test requests are read once, at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.prompts.pipeline.conclusion import conclude
from trimtab.prompts.pipeline.report import SearchReport
from trimtab.prompts.pipeline.restarts import run_restarts
from trimtab.prompts.pipeline.task import SearchTask, Settings
from trimtab.prompts.scoring.draft import bfloat16_copy, worthwhile
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.references import NAMED, ReferencePrompt, load_reference, reference_of
from trimtab.prompts.task.requests import Requests, behavior_requests, load_requests
from trimtab.prompts.task.rows import slot_ids
from trimtab.prompts.task.teacher import Teacher, teacher
from trimtab.results import Progress
from trimtab.results.journal import Journal
from trimtab.steering.prompt import PromptSteering

Given: TypeAlias = "str | ReferencePrompt | PromptSteering | Behavior"


def search(
    lm: LanguageModel,
    reference: Given,
    requests: Requests | str | os.PathLike[str] | None = None,
    *,
    slot: str = "prefix",
    separator: str | None = None,
    constraints: Constraints | None = None,
    settings: Settings | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    judge: bool = True,
    engine: Engine | None = None,
    **options: Any,
) -> SearchReport:
    """Find a prompt that makes the model answer as a reference prompt does.

    Args:
        lm: the model.
        reference: the prompt's text, the name of a built-in one such as "harbor:cats", a `ReferencePrompt`,
            a prompt lever (its slot and separator are taken), or a behavior, whose `prompt_toward`
            and judge are taken.
        requests: what users ask, in splits, or the name or path of such a file; a behavior brings
            its own.
        slot: `prefix` or `suffix`, where the prompt stands.
        separator: see `PromptSteering`.
        constraints: what may not be used; by default the reference's content words in any
            inflection, and all but printable ASCII.
        settings: numbers of everything.
        journal: a file of finished steps; the same search with the same file continues from it and
            ends in the same result.
        progress: called with (work done, work in all).
        judge: whether answers are generated and judged at the end.
        engine: does the restarts; this process by default.
        **options: fields of `Settings`, in place of `settings`.

    Raises:
        TrimtabError: unusable arguments, too few requests, constraints that leave nothing, or the
            journal of other work.
    """
    began = time.perf_counter()
    chosen = _settings(settings, options)
    if isinstance(reference, PromptSteering):
        slot, separator = reference.slot, reference.separator
    wanted = _reference(reference)
    split = _requests(lm, reference, requests, chosen.seed)
    lesson = teacher(
        lm, wanted.text, split, slot, separator,
        chosen.completion_tokens, chosen.early, chosen.early_weight,
    )  # fmt: skip
    make = partial(_task, reference=wanted, lesson=lesson, constraints=constraints, settings=chosen)
    task = make(lm)
    book = None if journal is None else Journal(journal, _header(lm, wanted, lesson, task))
    found = run_restarts(engine or Engine(lm), Job(task, make), book, progress)
    return conclude(task, wanted, split, lesson, found, judge=judge, began=began)


def _settings(given: Settings | None, options: Mapping[str, Any]) -> Settings:
    known = Settings.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown or (given is not None and options):
        raise TrimtabError(
            asked=f"a search with {', '.join(unknown or options)}",
            found="no such setting" if unknown else "settings= beside it",
            advice=f"settings are {', '.join(known)}; give them one way",
        )
    return given or Settings(**options)


def _reference(given: Given) -> ReferencePrompt:
    if isinstance(given, Behavior):
        return reference_of(given)
    if isinstance(given, PromptSteering):
        if given.vectors is not None:
            raise TrimtabError(
                asked=f"a search for what {given.label} does",
                found="a soft prompt, which is no text to be unlike",
                advice="give a prompt in words as the reference",
            )
        return ReferencePrompt("prompt", given.text)
    if isinstance(given, str):
        return load_reference(given) if given.startswith(NAMED) else ReferencePrompt("prompt", given)
    return given


def _requests(lm: LanguageModel, reference: Given, given: object, seed: int) -> Requests:
    if isinstance(given, Requests):
        return given
    if isinstance(given, str | os.PathLike):
        return load_requests(given, seed)
    if isinstance(reference, Behavior):
        return behavior_requests(reference, seed)
    if lm.name == "harbor":
        return load_requests("harbor")
    raise TrimtabError(
        asked="a prompt search",
        found="no requests",
        advice="give requests=, a file of what your users ask (docs/search.md)",
    )


def _task(
    lm: LanguageModel,
    reference: ReferencePrompt,
    lesson: Teacher,
    constraints: Constraints | None,
    settings: Settings,
) -> SearchTask:
    rows = lesson.train[: settings.train_requests]
    ids = slot_ids(lm, lesson.lever.text, rows[0])
    limits = Constraints(words=reference.words) if constraints is None else constraints
    # The text has to come back as the same tokens wherever the prompt is chosen on.
    bound = limits.bind(lm, [*rows, *lesson.validation])
    draft = bfloat16_copy(lm) if worthwhile(lm) else None
    k = settings.length or len(ids)
    return SearchTask(lm, rows, lesson.validation, bound, ids, k, settings, draft=draft)


def _header(lm: LanguageModel, reference: ReferencePrompt, lesson: Teacher, task: SearchTask) -> dict[str, Any]:
    """What makes two searches the same work."""
    rows = [[r.before, r.after, r.target, r.weights] for r in (*lesson.train, *lesson.validation)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return {
        "work": "prompt search",
        "fingerprint": lm.fingerprint,
        "reference": reference.text,
        "slot": lesson.lever.slot,
        "separator": lesson.lever.separator,
        "rows": digest,
        "constraints": asdict(task.bound.constraints),
        # More restarts, and a comparison, continue from the same journal.
        "settings": {
            name: value
            for name, value in asdict(task.settings).items()
            if "restarts" not in name and name != "compare"
        },
    }
