"""The demo: behaviors of the built-in model, from a contrast to a checkpoint, measured on the way.

For each behavior two vectors are found on training prompts: one trained to be added at all tokens,
so that it can be baked, and a mean difference for the template's tokens before the answer. Layers
and strengths are chosen on validation prompts. Every figure comes from test prompts.

The result is written as `index.html` (a page that opens offline) and `demo.json`. In the JSON each
behavior stands under `behaviors` and, for short look-ups, once more under its own name.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from trimtab.behaviors.behavior import EXAMPLE_LISTS, Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.doctor import versions
from trimtab.errors import TrimtabError
from trimtab.evaluation.compare import measure
from trimtab.evaluation.evaluate import Unsteered
from trimtab.evaluation.judges import judge_for
from trimtab.evaluation.measurement import Measurement
from trimtab.evaluation.summary import Summary
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.report.page import write_report
from trimtab.results import Progress
from trimtab.results.tables import to_plain, write_json
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.units import convert
from trimtab.steering.vector import VectorSteering
from trimtab.strength.choose import Choice, choose
from trimtab.strength.sweep import SweepRow, sweep
from trimtab.weights.bake import BakeReport, bake

MODEL = "harbor"
BEHAVIORS = ("refusal", "topic", "mood")
ALL_BEHAVIORS = (*BEHAVIORS, "register", "length", "truth", "agreement")

SEED = 0
EXAMPLES = 128  # per side, split into 64 to train, 32 to choose and 32 to score
NEUTRAL_EXAMPLES = 48  # 12 of them score
NEW_TOKENS = 40
NULLS = 2  # random directions per vector
SAMPLES = 3  # the first ones, not the best ones
COHERENCE_FLOOR = 0.9
TARGET = 0.9  # score that the window has to reach
SCREENED, CONFIRMED = 8, 2  # prompts of the first look at a strength, strengths looked at again
TRAINED_LAYER = 0.125  # of the depth: early enough for later layers to act on it
# Of next_token: fewer and larger steps than its defaults.
TRAINING = {"steps": 50, "batch_size": 8, "learning_rate": 0.15, "max_completion_tokens": 28}
READ_LAYERS = (0.375,)  # of the depth: where the mean difference may be added
# Strengths tried, in natural units (see `natural_strength`).
TRAINED_MULTIPLES = (1.0, 1.3, 1.7)
READ_MULTIPLES = (1.6, 3.0)
CURVE = (-2.0, -1.0, 0.0, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 4.0)  # of the chosen strength
NULL_CURVE = (-2.0, 4.0)
CURVE_PROMPTS = 16  # per side: a curve needs many strengths, each of them fewer prompts

STEPS = 7  # per behavior


@dataclass(frozen=True)
class Plan:
    """One method to try: what `find` is given, and the layers that `choose` may pick from."""

    method: str
    options: Mapping[str, Any]
    layers: tuple[int, ...]
    multiples: tuple[float, ...]

    @property
    def scope(self) -> str:
        """The tokens that are steered."""
        return str(self.options["scope"])


@dataclass(frozen=True)
class Attempt:
    """What came of a plan: a choice made on validation prompts, or why there is none."""

    plan: Plan
    choice: Choice | None
    refused: str = ""


def run_demo(
    out: str | PathLike[str] = "report",
    behaviors: Sequence[str | Behavior] = BEHAVIORS,
    progress: Progress | None = None,
    *,
    lm: LanguageModel | None = None,
    tell: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Find, choose, measure and bake each behavior; write `index.html` and `demo.json`.

    Args:
        out: folder for the page, the figures and one checkpoint per behavior.
        behaviors: built-in names, or behaviors of your own.
        progress: called with (steps done, steps in all).
        lm: another model than the built-in one.
        tell: called with the name and the figures of each behavior when it is done.

    Returns:
        What `demo.json` holds.

    Raises:
        TrimtabError: an unknown behavior, or a folder that cannot be written.
    """
    started = time.monotonic()
    wanted = [b if isinstance(b, Behavior) else load_behavior(b) for b in behaviors]
    folder = _folder(out)
    # Single precision: the checkpoint must answer exactly as the hook does.
    lm = load(MODEL, dtype=torch.float32) if lm is None else lm
    entries: dict[str, dict[str, Any]] = {}
    for index, behavior in enumerate(wanted):

        def step(done: int, before: int = index * STEPS) -> None:
            if progress is not None:
                progress(before + done, len(wanted) * STEPS)

        step(0)
        entries[behavior.name] = steer(lm, thin(behavior), folder, step)
        if tell is not None:
            tell(behavior.name, entries[behavior.name])
    data: dict[str, Any] = {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "command": " ".join(["trimtab", *sys.argv[1:]]) if "demo" in sys.argv else "run_demo()",
        "seed": SEED,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "behaviors": entries,
    }
    data = {**{name: entry for name, entry in entries.items() if name not in data}, **data}
    write_report(folder, data)
    write_json(folder / "demo.json", data)
    return data


def steer(
    lm: LanguageModel,
    behavior: Behavior,
    folder: Path,
    step: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Take one behavior from its contrast to measured levers.

    The headline vector is the one that can be baked, where validation found a strength for it; else
    the other. The choice between layers and strengths never sees a test prompt.
    """
    splits = behavior.split(SEED)
    known = Unsteered(lm, NEW_TOKENS)
    attempts: list[Attempt] = []
    for plan in plans(lm, behavior):
        attempts.append(try_plan(lm, behavior, known, plan))
        step(len(attempts))
    entry: dict[str, Any] = {
        "description": behavior.description,
        "data_hash": behavior.data_hash,
        "seed": SEED,
        "sizes": {
            name: len(splits.named(name).toward) + len(splits.named(name).away)
            for name in ("train", "validation", "test")
        },
    }
    passed = [attempt for attempt in attempts if attempt.choice is not None]
    if not passed or passed[0].choice is None:
        refused = "; ".join(f"{a.plan.method}: {a.refused}" for a in attempts)
        step(STEPS)
        return {**entry, "refused": f"No strength passes. {refused}", "methods": _methods(attempts)}
    vector = passed[0].choice.vector
    report, baked = bake_again(lm, vector, folder / f"baked-{behavior.name}")
    step(3)
    result = measure(
        lm,
        behavior,
        [attempt.choice.vector for attempt in passed if attempt.choice is not None],
        sign=1,
        nulls=NULLS,
        max_new_tokens=NEW_TOKENS,
        seed=SEED,
        checkpoint=baked,
        unsteered=known,
    )
    step(5)
    unit = abs(vector.strength)
    swept = partial(
        sweep,
        lm,
        splits.test,
        max_new_tokens=NEW_TOKENS,
        max_prompts=CURVE_PROMPTS,
        unsteered=known,
    )
    curve = swept(vector, [m * unit for m in CURVE])
    step(6)
    null = random_null(vector, null_seeds(SEED, 1)[0])
    nulls = swept(null, [m * unit for m in NULL_CURVE])
    step(STEPS)
    return {
        **entry,
        **_levers(result),
        "strength": vector.strength,
        "layers": list(vector.layers),
        "alpha": {str(layer): alpha for layer, alpha in vector.alphas.items()},
        "method": passed[0].plan.method,
        "scope": str(vector.scope),
        "units": units(vector),
        "window": window(curve.side(1), vector.strength),
        "baked_matches_hook": _match(report, folder),
        "methods": _methods(attempts, result),
        "curve": [{"strength": row.strength, **figures(row)} for row in curve.rows],
        "null_curve": [{"strength": row.strength, **figures(row)} for row in nulls.rows],
        "samples": [to_plain(sample) for sample in _vector_rows(result)[0].samples[:SAMPLES]],
    }


def plans(lm: LanguageModel, behavior: Behavior) -> list[Plan]:
    """List the methods to try, the bakeable one first."""
    early = max(0, round(TRAINED_LAYER * lm.n_layers))
    read = tuple(sorted({int(share * lm.n_layers) for share in READ_LAYERS}))
    trained = {"scope": "all", "layer": early, "judge": judge_for(behavior)}
    trained |= TRAINING
    read_off = {"position": "post_instruction", "scope": "post_instruction"}
    return [
        Plan("next_token", trained, (early,), TRAINED_MULTIPLES),
        Plan("mean_difference", read_off, read, READ_MULTIPLES),
    ]


def try_plan(lm: LanguageModel, behavior: Behavior, known: Unsteered, plan: Plan) -> Attempt:
    """Find a vector on the training split and choose its layer and strength on validation."""
    try:
        vector = find(lm, behavior, plan.method, seed=SEED, **plan.options)
        unit = natural_strength(vector, plan.layers)
        chosen = choose(
            lm,
            behavior.split(SEED).validation,
            vector,
            layers=[(layer,) for layer in plan.layers],
            strengths=[multiple * unit for multiple in plan.multiples],
            coherence_floor=COHERENCE_FLOOR,
            screen=SCREENED,
            confirm=CONFIRMED,
            max_new_tokens=NEW_TOKENS,
            unsteered=known,
        )
    except TrimtabError as error:  # nothing found, or no strength passes: shown, not hidden
        return Attempt(plan, None, error.found)
    return Attempt(plan, chosen)


def natural_strength(vector: VectorSteering, layers: Sequence[int]) -> float:
    """Return the strength m that means the same for every vector: one class gap, or as trained.

    A vector that was read off is at 1 where it adds the distance between the two sides' means
    (the middle one of `layers`); a trained one where it adds what it was trained to add.
    """
    if vector.provenance.get("method") == "next_token":
        return abs(vector.strength)
    gaps = sorted(abs(vector.class_gaps[at]) / vector.scales[at] for at in layers)
    return gaps[len(gaps) // 2]


def thin(behavior: Behavior) -> Behavior:
    """Keep at most `EXAMPLES` prompts of each list, drawn by seed, pairs together."""
    kept: dict[str, list[int]] = {}
    for name in EXAMPLE_LISTS:
        count = len(getattr(behavior, name))
        most = NEUTRAL_EXAMPLES if name == "neutral" else EXAMPLES
        # The same draw for equally long lists, so that pair i keeps both its members.
        kept[name] = sorted(random.Random(SEED).sample(range(count), min(count, most)))
    return behavior.select(kept)


def bake_again(
    lm: LanguageModel, vector: VectorSteering, folder: Path
) -> tuple[BakeReport | None, LanguageModel | None]:
    """Bake into a folder that an earlier demo may have filled, and load the checkpoint.

    Both are None where the vector cannot be baked exactly.
    """
    if str(vector.scope) != "all":
        return None, None
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise TrimtabError(
                asked=f"to write a checkpoint to {folder}",
                found="something that is not a checkpoint",
                advice="move it away, or give the demo another folder with --out",
            )
        shutil.rmtree(folder)
    report = bake(lm, vector, folder)
    return report, load(folder, dtype=lm.model.dtype)


def window(rows: Sequence[SweepRow], chosen: float) -> list[float] | None:
    """Return the run of measured strengths around `chosen` that reach the target and stay coherent.

    None where the chosen strength itself does not: then there is no window to speak of.
    """
    fine = [row.score >= TARGET and row.coherence >= COHERENCE_FLOOR for row in rows]
    nearest = min(range(len(rows)), key=lambda i: abs(rows[i].strength - chosen))
    if not fine[nearest]:
        return None
    first = last = nearest
    while first > 0 and fine[first - 1]:
        first -= 1
    while last + 1 < len(rows) and fine[last + 1]:
        last += 1
    return [rows[first].strength, rows[last].strength]


def figures(row: Summary) -> dict[str, Any]:
    """Return the figures that every lever and every strength has."""
    names = ("score", "low", "high", "n", "coherence")
    kl = ("damage", "damage_p95", "spill", "spill_p95")
    return {name: getattr(row, name) for name in names + kl}


def units(vector: VectorSteering) -> list[dict[str, Any]]:
    """Return the strength in every unit, one dict a layer."""
    return [
        {
            "layer": row.layer,
            "m": row.m,
            "alpha": row.alpha,
            "alpha_over_mu": row.relative,
            "class_gaps": row.class_gaps,
            "spreads": row.spreads,
        }
        for row in convert(vector).rows
    ]


def _folder(out: str | PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrimtabError(
            asked=f"a report in {folder}",
            found=str(error),
            advice="choose a folder that can be written",
        ) from error
    return folder


def _vector_rows(result: Measurement) -> list[Any]:
    return [row for row in result.rows if row.kind == "vector"]


def _levers(result: Measurement) -> dict[str, Any]:
    """Name the rows as the report does; the first vector and its null are the headline."""
    named: dict[str, Any] = {}
    kinds = {"checkpoint": "baked"}
    for row in result.rows:
        named.setdefault(kinds.get(row.kind, row.kind), figures(row))
    return named


def _methods(
    attempts: Sequence[Attempt], result: Measurement | None = None
) -> list[dict[str, Any]]:
    rows = iter(_vector_rows(result)) if result is not None else iter(())
    listed: list[dict[str, Any]] = []
    for attempt in attempts:
        entry: dict[str, Any] = {"method": attempt.plan.method, "scope": attempt.plan.scope}
        if attempt.choice is None:
            listed.append({**entry, "chosen": False, "refused": attempt.refused})
            continue
        vector, row = attempt.choice.vector, next(rows)
        entry |= {"layers": list(vector.layers), "strength": vector.strength, **figures(row)}
        entry |= {"null": row.null_score, "validation_score": attempt.choice.chosen.row.score}
        listed.append({**entry, "chosen": not any(e["chosen"] for e in listed)})
    return listed


def _match(report: BakeReport | None, folder: Path) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "path": str(report.path.relative_to(folder)),
        "max_logit_difference": report.max_logit_difference,
        "tolerance": report.tolerance,
        "equal_text": report.equal_text,
    }
