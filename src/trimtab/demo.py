"""The demo: behaviors of a model, from a contrast to a checkpoint: find, tune, bake, measure.

Vectors come from training prompts, layers and strengths from validation prompts; what is compared
comes from test prompts. The result is written as `index.html` (a page that opens offline) and
`demo.json`. In the JSON each behavior stands under `behaviors` and, for short look-ups, once more
under its own name.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.doctor import versions
from trimtab.errors import TrimtabError
from trimtab.evaluation.compare import measure
from trimtab.evaluation.summary import Summary
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.report.demo_page import SAMPLES, Steered, steered_section
from trimtab.report.page import Section, write_page
from trimtab.results import Progress
from trimtab.results.tables import Table, to_plain, write_json
from trimtab.steering.units import convert
from trimtab.steering.vector import VectorSteering
from trimtab.strength.sweep import NoStrengthPasses
from trimtab.strength.tune import tune
from trimtab.weights.bake import BakeReport, bake

BEHAVIORS = ("refusal", "topic", "mood")
ALL_BEHAVIORS = (*BEHAVIORS, "register", "length", "truth", "agreement")
METHOD = "next_token"
# Fewer and larger steps than the method's defaults, for a demo has to be quick.
QUICK = {"steps": 50, "batch_size": 8, "learning_rate": 0.15, "scope": "all"}
BUDGET = 0.5  # of damage, nats per token, 95th percentile
MAX_PROMPTS = 32  # a side on which something is tuned or measured
NULLS = 2
SEED = 0
STAGES = 4  # find, tune, bake, measure
PART = 100  # of progress, per stage


def run_demo(
    out: str | PathLike[str] = "report",
    behaviors: Sequence[str | Behavior] = BEHAVIORS,
    progress: Progress | None = None,
    *,
    model: str | LanguageModel = "harbor",
    options: Mapping[str, Any] = QUICK,
    coherence_floor: float = 0.9,
    max_new_tokens: int = 40,
    tell: Callable[[Section], None] | None = None,
) -> dict[str, Any]:
    """Find, tune, bake and measure each behavior; return what is written to `demo.json`.

    The folder also gets `index.html` and a checkpoint per behavior. `options` are those of the method;
    `tell` is called with the section of each behavior when it is done.
    """
    started = time.monotonic()
    wanted = [b if isinstance(b, Behavior) else load_behavior(b) for b in behaviors]
    folder = _folder(out)
    # Single precision: the checkpoint must answer exactly as the hook does.
    lm = load(model, dtype=torch.float32) if isinstance(model, str) else model
    effort: dict[str, Any] = {
        "max_prompts": MAX_PROMPTS,
        "max_new_tokens": max_new_tokens,
        "seed": SEED,
    }

    def told(stage: int, done: int, total: int) -> None:
        if progress is not None:
            progress(stage * PART + done * PART // max(total, 1), len(wanted) * STAGES * PART)

    entries: dict[str, dict[str, Any]] = {}
    sections: list[Section] = []
    for index, behavior in enumerate(wanted):
        finding, tuning, baking, measuring = (
            partial(told, index * STAGES + stage) for stage in range(STAGES)
        )
        entry: dict[str, Any] = {
            "description": behavior.description,
            "data_hash": behavior.data_hash,
            "seed": SEED,
            "sizes": _sizes(behavior),
        }
        finding(0, 1)
        try:
            vector = find(lm, behavior, METHOD, seed=SEED, **options)
            finding(1, 1)
            tuned = tune(
                lm, behavior, vector, BUDGET, coherence_floor=coherence_floor, scope=["all"],
                progress=tuning, **effort,
            )  # fmt: skip
        except TrimtabError as error:  # nothing found, or no strength passes: shown, not hidden
            tables = (error.table(),) if isinstance(error, NoStrengthPasses) else ()
            section = Section(behavior.name, (behavior.description,), (), tables, (error.found,))
            entry["refused"] = error.found
        else:
            report, baked = bake_again(lm, tuned, folder / f"baked-{behavior.name}")
            baking(1, 1)
            measured = measure(
                lm, behavior, [tuned], nulls=NULLS, checkpoint=baked, progress=measuring, **effort
            )
            found = Steered(behavior.description, tuned.report, convert(tuned), measured, report)
            section = steered_section(found)
            entry |= _figures(found, folder)
        measuring(1, 1)
        entries[behavior.name] = entry
        sections.append(section)
        if tell is not None:
            tell(section)
    facts = {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "command": " ".join(["trimtab", *sys.argv[1:]]) if "demo" in sys.argv else "run_demo()",
        "seed": SEED,
        "method": METHOD,
        "budget": BUDGET,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_page(
        folder,
        [*sections, _provenance(facts, entries)],
        title="What moved, and what broke",
        lead=f"Steering {lm.name}: directions from training prompts, layers and strengths from "
        "validation prompts, comparisons on test prompts that neither has seen.",
    )
    data = {**entries, **facts, "behaviors": entries}
    write_json(folder / "demo.json", data)
    return data


def _folder(out: str | PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrimtabError(
            f"a report in {folder}", str(error), "choose a folder that can be written"
        ) from error
    return folder


def bake_again(
    lm: LanguageModel, vector: VectorSteering, folder: Path
) -> tuple[BakeReport | str, LanguageModel | None]:
    """Bake into a folder that an earlier demo may have filled, and load it; or say why not."""
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise TrimtabError(
                asked=f"to write a checkpoint to {folder}",
                found="something that is not a checkpoint",
                advice="move it away, or give the demo another folder with --out",
            )
        shutil.rmtree(folder)
    try:
        report = bake(lm, vector, folder)
    except TrimtabError as error:  # such as a scope that weights cannot hold
        return error.found, None
    return report, load(folder, dtype=lm.model.dtype)


def _sizes(behavior: Behavior) -> dict[str, int]:
    splits = behavior.split(SEED)
    names = ("train", "validation", "test")
    return {name: len(splits.named(name).toward) + len(splits.named(name).away) for name in names}


def _figures(found: Steered, folder: Path) -> dict[str, Any]:
    """What `demo.json` says of a behavior: levers by name, the strength, the curve, answers."""
    tuned, levers, baked = found.tuned, found.levers, None
    if isinstance(found.baked, BakeReport):
        compared = _picked(found.baked, "max_logit_difference", "tolerance", "equal_text")
        baked = {"path": str(found.baked.path.relative_to(folder)), **compared}
    return {
        **{"baked" if kind == "checkpoint" else kind: _row(row) for kind, row in levers.items()},
        **_picked(tuned, "strength", "layers", "alpha", "method", "scope", "window"),
        "units": [
            {
                **_picked(row, "layer", "m", "alpha", "class_gaps", "spreads"),
                "alpha_over_mu": row.relative,
            }
            for row in found.units.rows
        ],
        "baked_matches_hook": baked,
        "curve": [{"strength": row.strength, **_row(row)} for row in tuned.curve],
        "samples": to_plain(levers["vector"].samples[:SAMPLES]),
    }


def _row(row: Summary) -> dict[str, Any]:
    kl = ("damage", "damage_p95", "spill", "spill_p95")
    return _picked(row, "score", "low", "high", "n", "coherence", *kl)


def _picked(of: object, *names: str) -> dict[str, Any]:
    return {name: to_plain(getattr(of, name)) for name in names}


def _provenance(facts: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> Section:
    listed = {**facts, "versions": _pairs(facts["versions"])}
    for name, entry in entries.items():
        listed |= {
            f"{name}: data hash": entry["data_hash"],
            f"{name}: prompts": _pairs(entry["sizes"]),
        }
    rows = tuple((label, str(value)) for label, value in listed.items())
    return Section("Provenance", tables=(Table("", ("what", "found"), rows),))


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
