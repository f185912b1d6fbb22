"""Evaluations that do not depend on each other, wherever the evaluator's engine does them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from trimtab.evaluation.evaluate import Evaluation, Evaluator
from trimtab.models.model import LanguageModel
from trimtab.passes.job import Job
from trimtab.results.journal import Notes
from trimtab.steering.vector import Switch, VectorSteering

Lever: TypeAlias = "Switch | LanguageModel | None"


def run_each(
    evaluator: Evaluator,
    asked: Sequence[tuple[Lever, int]],
    done: Callable[[], None] | None = None,
) -> list[Evaluation]:
    """Return `evaluator.run(lever, sign)` of each pair.

    Second models are here, and stay here; so does the unsteered model, whose answers are shared.
    """
    here = [lever is None or isinstance(lever, LanguageModel) for lever, _ in asked]
    found: dict[int, Evaluation] = {}
    for number, (lever, sign) in enumerate(asked):
        if here[number]:
            found[number] = evaluator.run(lever, sign)
            if done is not None:
                done()
    rest = [number for number in range(len(asked)) if not here[number]]
    units = [partial(_run, *asked[number]) for number in rest]
    results = evaluator.engine.map(
        _job(evaluator), units, done=lambda *_: None if done is None else done()
    )
    found |= dict(zip(rest, results, strict=True))
    return [found[number] for number in range(len(asked))]


def run_groups(
    evaluator: Evaluator,
    vector: VectorSteering,
    groups: Sequence[tuple[Sequence[float], int]],
    done: Callable[[int, list[Evaluation]], None] | None = None,
) -> list[list[Evaluation]]:
    """Return `evaluator.run_many(vector, strengths, sign)` of each pair; `run` where it is one."""
    units = [partial(_run_many, vector, tuple(strengths), sign) for strengths, sign in groups]
    return evaluator.engine.map(_job(evaluator), units, done=done)


def _job(evaluator: Evaluator) -> Job[Evaluator]:
    make = partial(
        Evaluator,
        behavior=evaluator.behavior,
        max_new_tokens=evaluator.max_new_tokens,
        max_prompts=evaluator.max_prompts,
    )
    return Job(evaluator, make)


def _run(lever: Lever, sign: int, evaluator: Evaluator, notes: Notes) -> Evaluation:
    return evaluator.run(lever, sign)


def _run_many(
    vector: VectorSteering,
    strengths: Sequence[float],
    sign: int,
    evaluator: Evaluator,
    notes: Notes,
) -> list[Evaluation]:
    if len(strengths) > 1:
        return evaluator.run_many(vector, strengths, sign)
    return [evaluator.run(vector.at(m) if m else None, sign) for m in strengths]
