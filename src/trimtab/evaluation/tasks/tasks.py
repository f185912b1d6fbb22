"""Levers on the tasks of the evaluation harness lm-eval, paired with the unsteered model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from trimtab.arguments import NULLS
from trimtab.errors import TrimtabError, extra
from trimtab.evaluation.compare import null_notes, nulls_of, unique_names
from trimtab.evaluation.tasks.files import Loaded, load_tasks, members, set_examples
from trimtab.evaluation.tasks.table import Scores, TaskMeasurement, TaskRow, read_scores, rows_of
from trimtab.results import Progress
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Steering, VectorSteering

if TYPE_CHECKING:
    from trimtab.evaluation.tasks.model import HarnessModel
    from trimtab.models.model import LanguageModel

# Resamples of the standard errors that the harness has no formula for.
_RESAMPLES = 1000


def measure_tasks(
    lm: LanguageModel,
    tasks: Sequence[str],
    levers: Sequence[Steering] = (),
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    fewshot: int | None = None,
    seed: int = 0,
    nulls: int = NULLS,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    progress: Progress | None = None,
) -> TaskMeasurement:
    """Run tasks of lm-eval on the unsteered model, each lever and random directions.

    The harness builds the requests and scores the answers; the model is called by Trimtab, in
    float32 from the logits on, which is told where a context ends: every scope is exact.

    Args:
        lm: the model.
        tasks: names that lm-eval knows, or that are defined below `include_path`.
        levers: vectors at their strength and scope; prompts, which the chat template puts in place.
        include_path: a folder with tasks of one's own. A data file named in them is looked for in
            the current folder, then there.
        limit: documents of a task: at most so many from 1 on, a share below 1; None for all.
        fewshot: worked examples before each document; the task's own number when None.
        seed: of examples, sampled answers, nulls and intervals.
        nulls: random directions per vector.
        batch_size: rows of a call of the model.
        apply_chat_template: whether documents are put to the model as a user's turn.
        progress: called with (runs done, runs in all).

    Raises:
        TrimtabError: lm-eval is missing; a task is unknown or has no data; a lever that cannot be
            applied to these tasks.
    """
    extra("lm_eval.models.huggingface", "lm-eval")  # refuses before any work
    levers = [levers] if isinstance(levers, Steering) else list(levers)
    _check_context(lm, apply_chat_template)
    for lever in levers:
        check_lever(lm, lever, apply_chat_template)
    harness = importlib.import_module("trimtab.evaluation.tasks.model")
    with harness.quiet():
        loaded = load_tasks(tasks, include_path)
        _check_rolling(loaded, levers)
        for task in loaded["tasks"].values():
            set_examples(task, fewshot, seed)
        model = harness.HarnessModel(lm, batch_size)
        names = unique_names([lever.label for lever in levers])
        drawn = [nulls_of(lever, seed, nulls) for lever in levers]
        done, total = 0, 1 + sum(1 + len(each) for each in drawn)

        def run(lever: Steering | None) -> Scores:
            nonlocal done
            scores = _run(model, lever, loaded, limit, apply_chat_template, seed)
            done += 1
            if progress is not None:
                progress(done, total)
            return scores

        baseline = run(None)
        rows = rows_of("baseline", "baseline", None, baseline, None, [], seed)
        for name, lever, random in zip(names, levers, drawn, strict=True):
            kind = "vector" if isinstance(lever, VectorSteering) else "lever"
            scores, null = run(lever), [run(each) for each in random]
            rows += rows_of(name, kind, lever.strength, scores, baseline, null, seed)
    order = {key: place for place, key in enumerate(baseline)}
    return TaskMeasurement(
        model=lm.name or type(lm.model).__name__,
        fingerprint=lm.fingerprint,
        tasks=tuple(tasks),
        harness=f"lm-eval {version('lm_eval')}",
        limit=limit,
        fewshot=fewshot,
        chat_template=apply_chat_template,
        seed=seed,
        rows=tuple(sorted(rows, key=lambda row: order[row.task, row.metric])),
        notes=_notes(rows, levers, nulls, limit),
    )


def check_lever(lm: LanguageModel, lever: Steering, chat: bool) -> None:
    """Refuse a lever that cannot be applied to the harness's requests.

    Raises:
        TrimtabError: a vector for another model; the scope `post_instruction`, or a prompt, without
            the chat template; a soft prompt.
    """
    asked = f"to measure tasks with {lever.label}"
    if isinstance(lever, VectorSteering):
        lever.check(lm)
        if lever.scope.name == "post_instruction" and not chat:
            raise TrimtabError(
                asked=asked,
                found="scope post_instruction, the template's tokens between the user's text and "
                "the answer; the harness's plain texts have none",
                advice=_chat_advice(lm, "use vector.select(scope='last')"),
            )
    elif isinstance(lever, PromptSteering) and lever.strength:
        if lever.vectors is not None:
            raise TrimtabError(
                asked=asked,
                found="vectors that stand for no text; the harness's requests are texts",
                advice="bake it with `trimtab bake` and measure the tasks of the new model",
            )
        if not chat:
            raise TrimtabError(
                asked=asked,
                found=f"plain texts, which have no place for a {lever.slot} prompt",
                advice=_chat_advice(lm, "write the text into the task's `description`"),
            )


def _check_context(lm: LanguageModel, chat: bool) -> None:
    """Refuse what the model's prompts get already, where the harness would lose it."""
    if chat and not getattr(lm.tokenizer, "chat_template", None):
        raise TrimtabError(
            asked=f"to measure tasks on {lm.name} with the chat template",
            found="a tokenizer without one",
            advice="leave out apply_chat_template (--apply-chat-template)",
        )
    system, inserts = lm.context
    if any(insert.ids for insert in inserts) or not chat and (inserts or system is not None):
        raise TrimtabError(
            asked=f"to measure tasks on {lm.name} with a prompt that is on already",
            found="requests of the harness that have no place for it",
            advice="measure outside the prompt's `with` block, and give the prompt as a lever",
        )


def _check_rolling(loaded: Loaded, levers: Sequence[Steering]) -> None:
    """Refuse prompts where whole texts are scored, without any prompt."""
    rolling = [n for n, t in loaded["tasks"].items() if t.OUTPUT_TYPE == "loglikelihood_rolling"]
    for lever in levers:
        prompted = isinstance(lever, PromptSteering) and lever.strength
        after = isinstance(lever, VectorSteering) and lever.scope.name == "post_instruction"
        if rolling and (prompted or after):
            raise TrimtabError(
                asked=f"to measure {', '.join(rolling)} with {lever.label}",
                found="whole texts that are scored without a prompt",
                advice="measure this task with a vector of scope all",
            )


def _chat_advice(lm: LanguageModel, other: str) -> str:
    if getattr(lm.tokenizer, "chat_template", None):
        return f"apply the chat template (--apply-chat-template), or {other}"
    return other


def _run(
    model: HarnessModel,
    lever: Steering | None,
    loaded: Loaded,
    limit: float | None,
    chat: bool,
    seed: int,
) -> Scores:
    """One run of the harness, on a model that is steered all the while."""
    evaluate = importlib.import_module("lm_eval").evaluate
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)  # the same examples for every lever
    devices = sorted(
        {p.device.index for p in model.lm.model.parameters() if p.device.type == "cuda"}
    )
    steered = nullcontext() if lever is None else lever.on(model.lm)
    with steered, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        results = evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return read_scores(results, members(loaded))


def _notes(
    rows: Sequence[TaskRow], levers: Sequence[Steering], nulls: int, limit: float | None
) -> tuple[str, ...]:
    notes = [
        "value ± standard error; difference to the unsteered model with its 95 % interval, "
        "documents resampled in pairs"
    ]
    if limit is not None:
        notes.append(f"limit {limit:g}: the first documents only")
    loose = sorted({f"{row.metric} of {row.task}" for row in rows if row.values is None})
    if loose:
        notes.append(f"no interval, for they are no mean over documents: {', '.join(loose)}")
    return (*notes, *null_notes(levers, nulls))
