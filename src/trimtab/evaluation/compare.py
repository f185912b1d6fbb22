"""Levers side by side: score, coherence, damage, spill, each with a null, an interval and n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Direction, signs_of
from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.evaluate import Evaluation, Evaluator, Unsteered
from trimtab.evaluation.judges import judge_kind
from trimtab.evaluation.measurement import Measurement, Row
from trimtab.evaluation.spread import run_each
from trimtab.evaluation.summary import KL_NOTE, Summary, mean, raw_alphas, summary
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap, two_way_bootstrap
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.units import convert
from trimtab.steering.vector import Steering, VectorSteering
from trimtab.steering.weights import Scaled


def measure(
    lm: LanguageModel,
    behavior: Behavior,
    levers: Sequence[Steering] = (),
    *,
    split: str | None = "test",
    direction: Direction | None = None,
    nulls: int = NULLS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_prompts: int | None = MAX_PROMPTS,
    seed: int = 0,
    checkpoint: LanguageModel | None = None,
    unsteered: Unsteered | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Measurement:
    """Measure levers beside the unsteered model, the plain prompt and random directions.

    Args:
        lm: the unsteered model.
        behavior: what is judged; its `split` (train, validation, test) is used, None for all of it.
        levers: steerings; see `direction` for where they are scored.
        split: must be data on which nothing was selected; prompts are scored as `Evaluator` says.
        direction: `toward`, `away` or `both`, for every lever; None: vectors by the sign of their
            strength, everything else as the vectors, toward without any.
        nulls: random directions per vector.
        max_new_tokens: length of answers.
        max_prompts: cap per side; None for all.
        seed: of the split, the bootstrap and the nulls.
        checkpoint: a second model, e.g. the reloaded baked one, measured like a lever.
        unsteered: answers to share with other measurements of this model at this length.
        progress: called with (rows measured, rows in all), nulls counted one by one.
        engine: does the levers and nulls; this process by default.

    Raises:
        TrimtabError: for an unknown split, an empty side, or a judge that cannot be built.
    """
    levers = [levers] if isinstance(levers, Steering) else list(levers)
    data = behavior if split is None else behavior.split(seed=seed).named(split)
    evaluator = Evaluator(
        lm, data, max_new_tokens=max_new_tokens, max_prompts=max_prompts, unsteered=unsteered,
        engine=engine,
    )  # fmt: skip
    names = unique_names([lever.label for lever in levers])
    signs = _signs(levers) if direction is None else signs_of(direction)
    plan = _plan(behavior, levers, names, checkpoint, signs, direction is not None)
    drawn = [nulls_of(lever, seed, nulls) for _, _, lever, _ in plan]
    asked: list[tuple[Steering | LanguageModel | None, int]] = []
    for (_, _, lever, side), directions in zip(plan, drawn, strict=True):
        asked += [(lever, side), *((null, side) for null in directions)]
    evaluator.engine.expect([lever for lever, _ in asked if isinstance(lever, VectorSteering)])
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(asked))

    results = iter(run_each(evaluator, asked, tell))
    rows: list[Row] = []
    baselines: dict[int, Summary] = {}
    for (name, kind, lever, side), directions in zip(plan, drawn, strict=True):
        summed = summary(next(results), seed)
        baseline = baselines.setdefault(side, summed)  # the plan starts each side with it
        row = _row(name, kind, lever, summed, baseline, seed)
        if not directions:
            rows.append(row)
            continue
        random = list(islice(results, len(directions)))
        scores = [mean(result.scores) for result in random]
        pooled = averaged(random, seed)
        null = _row(f"random control of {name}", "null", lever, pooled, baseline, seed, scores)
        rows += [replace(row, null_score=null.score), null]
    return Measurement(
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        split=split,
        model=lm.name or type(lm.model).__name__,
        fingerprint=lm.fingerprint,
        judge=judge_kind(behavior),
        seed=seed,
        max_new_tokens=max_new_tokens,
        rows=tuple(rows),
        notes=_notes(data, plan, signs, nulls),
    )


Entry = tuple[str, str, "Steering | LanguageModel | None", int]


def _plan(
    behavior: Behavior,
    levers: Sequence[Steering],
    names: Sequence[str],
    checkpoint: LanguageModel | None,
    signs: Sequence[int],
    forced: bool,
) -> list[Entry]:
    plan: list[Entry] = []
    for side in signs:
        plan.append(("baseline", "baseline", None, side))
        text = behavior.prompt_toward if side > 0 else behavior.prompt_away
        if text is not None:
            plan.append(("prompt", "prompt", PromptSteering(text), side))
        for lever, name in zip(levers, names, strict=True):
            scaled = isinstance(lever, Scaled)
            if not scaled or forced or _sign(lever) == side:
                kind = "vector" if isinstance(lever, VectorSteering) else "lever"
                plan.append((name, kind, lever, side))
        if checkpoint is not None:
            plan.append(("checkpoint", "checkpoint", checkpoint, side))
    return plan


def _signs(levers: Sequence[Steering]) -> list[int]:
    found = {_sign(lever) for lever in levers if isinstance(lever, Scaled)}
    return sorted(found or {1}, reverse=True)


def _sign(lever: Steering) -> int:
    return -1 if lever.strength < 0 else 1


def _row(
    name: str,
    kind: str,
    lever: Steering | LanguageModel | None,
    summed: Summary,
    baseline: Summary,
    seed: int,
    null_scores: Sequence[float] = (),
) -> Row:
    gain, low, high = None, None, None
    if kind != "baseline":
        gain = summed.score - baseline.score
        low, high = paired_bootstrap(summed.scores, baseline.scores, seed)
    return Row(
        **vars(summed),
        name=name,
        kind=kind,
        strength=lever.strength if isinstance(lever, Steering) else None,
        alphas=raw_alphas(lever),
        gain=gain,
        gain_low=low,
        gain_high=high,
        null_scores=tuple(null_scores),
    )


def averaged(results: Sequence[Evaluation], seed: int) -> Summary:
    """Average nulls: each prompt's figures over the directions, tokens pooled over them."""
    spills = [result.spill_tokens for result in results if result.spill_tokens is not None]
    pooled = Evaluation(
        sign=results[0].sign,
        scores=tuple(_means([result.scores for result in results])),
        coherences=tuple(_means([result.coherences for result in results])),
        damage_tokens=_joined([result.damage_tokens for result in results]),
        spill_tokens=_joined(spills) if spills else None,
        samples=results[0].samples,
    )
    grid = torch.tensor([result.scores for result in results], dtype=torch.float64)
    return summary(pooled, seed, two_way_bootstrap(grid, seed))


def _means(grid: Sequence[Sequence[float]]) -> list[float]:
    return [sum(same) / len(same) for same in zip(*grid, strict=True)]


def _joined(groups: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(list(same)) for same in zip(*groups, strict=True))


def nulls_of(lever: object, seed: int, count: int) -> list[Scaled]:
    """Return the lever's random directions; none where it has no norm-matched random counterpart."""
    if not isinstance(lever, Scaled) or count < 1:
        return []
    return [random_null(lever, each) for each in null_seeds(seed, count)]


def unique_names(labels: Sequence[str]) -> list[str]:
    """Return the levers' names in tables: their labels, numbered where two are the same."""
    taken = {"baseline", "prompt", "checkpoint"}
    names: list[str] = []
    for label in labels:
        name, copy = label, 2
        while name in taken:
            name, copy = f"{label} ({copy})", copy + 1
        taken.add(name)
        names.append(name)
    return names


def _notes(
    behavior: Behavior, plan: Sequence[Entry], signs: Sequence[int], nulls: int
) -> tuple[str, ...]:
    notes = [KL_NOTE, "gain: paired with the baseline; random: score of the random control"]
    notes += [
        f"{lever.label}: {convert(lever).sentence}"
        for _, kind, lever, _ in plan
        if kind == "vector" and isinstance(lever, VectorSteering) and lever.norms
    ]
    if behavior.requests:
        notes.append("scored on plain requests, which call for neither side")
    if not behavior.neutral:
        notes.append("no spill: the behavior has no neutral prompts")
    for side in signs:
        text = behavior.prompt_toward if side > 0 else behavior.prompt_away
        if text is None:
            field = "prompt_toward" if side > 0 else "prompt_away"
            notes.append(f"no plain-prompt baseline: the behavior has no {field}")
    return (*notes, *null_notes([lever for _, _, lever, _ in plan], nulls))


def null_notes(levers: Sequence[object], nulls: int) -> list[str]:
    """Say under a table why there is no random control where there is none."""
    notes = []
    if any(isinstance(lever, PromptSteering) for lever in levers):
        notes.append("no random control for prompts: a prompt has no norm-matched random counterpart")
    if nulls < 1 and any(isinstance(lever, VectorSteering) for lever in levers):
        notes.append("no random control: none was asked for")
    return notes
