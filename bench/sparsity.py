"""How alike the vectors of four methods are, and how few dimensions they need, on the built-in model.

`python bench/sparsity.py --json bench/results/sparsity.json [--folder FOLDER] [--behaviors refusal]`

All vectors are found at one layer. Each is tuned for both directions under one budget of damage (the
weakest strength that does as well), made sparse at that strength, and scored on test prompts. A random
direction stands beside the methods wherever dimensions are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta

from common import emit
from overlap import PERMUTATIONS, dimension_overlap
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation import judge_for
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import summary
from trimtab.mechanism.case import Case
from trimtab.mechanism.sparse.curve import sparsity_curve
from trimtab.mechanism.sparse.dimensions import ORDERS, dimension_effects, dimension_scores
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.results.tables import write_json
from trimtab.steering.load import load_steering
from trimtab.steering.nulls import random_null
from trimtab.steering.vector import VectorSteering
from trimtab.strength.sweep import NoStrengthPasses
from trimtab.strength.tune import tune

LAYER = 1
BUDGETS = (0.5, 1.0)
TUNED = (
    "scope", "strength", "score", "low", "high", "n", "baseline", "null", "coherence", "damage",
    "damage_p95", "spill",
)  # fmt: skip
SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
OVERLAP_SHARES = (0.1, 0.2)
# What a trained vector needs to work (docs/findings.md): one vector moves refusal both ways; nobody
# answers "not about cats" in a way of its own; mood breaks the text when it is added everywhere.
TRAINED: dict[str, dict[str, Any]] = {
    "refusal": {"side": "both"},
    "topic": {"side": "toward"},
    "mood": {"side": "toward", "scope": "post_instruction"},
}
SEED = 0
METHODS: dict[str, dict[str, Any]] = {
    "mean_difference": {"position": "post_instruction"},
    "selected_difference": {},
    "next_token": {},
    "preference": {},
}


def found(
    lm: LanguageModel, behavior: Behavior, method: str, folder: Path | None
) -> VectorSteering:
    """Return a method's vector at the common layer, from its file where there is one."""
    path = None if folder is None else folder / f"{behavior.name}-{method}.safetensors"
    if path is not None and path.exists():
        kept = load_steering(path)
        assert isinstance(kept, VectorSteering)
        return kept
    options = dict(METHODS[method])
    if method in ("next_token", "preference"):
        options["judge"] = judge_for(behavior)
        options |= TRAINED[behavior.name]
    vector = find(lm, behavior, method, layers=LAYER, seed=SEED, **options)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        vector.save(path)
    return vector


def selection(lm: LanguageModel, behavior: Behavior) -> list[dict[str, object]]:
    """Let the scores choose the layer too, and answer test prompts at the strength that comes out."""
    rows: list[dict[str, object]] = []
    test = Evaluator(lm, behavior.split(SEED).test, max_prompts=32)
    for scope in ("post_instruction", "all"):
        row = {"kind": "selected", "behavior": behavior.name, "scope": scope}
        try:
            vector = find(lm, behavior, "selected_difference", scope=scope, seed=SEED)
        except TrimtabError as error:
            rows.append({**row, "found": error.found})
            continue
        details = vector.provenance["details"]
        for sign in (1, -1):
            m = sign * vector.strength
            result = summary(test.run(vector.at(m), sign), SEED)
            rows.append(
                {
                    **row, **details["selected"], "candidates": details["candidates"],
                    "passed": details["passed"], "strength": m, "score": result.score,
                    "low": result.low, "high": result.high, "coherence": result.coherence,
                    "damage": result.damage,
                }
            )  # fmt: skip
    return rows


def kept(
    folder: Path | None, name: str, make: Callable[..., list[dict[str, Any]]], *given: object
) -> list[dict[str, Any]]:
    """Return rows from their file where there is one, else make them and keep them."""
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.exists():
        return json.loads(path.read_text())
    rows = make(*given)
    if path is not None:
        write_json(path, rows)
    return rows


def tuned(lm: LanguageModel, behavior: Behavior, vector: VectorSteering) -> list[dict[str, Any]]:
    """Return the effect under the budget of damage (or the next one), one row per direction."""
    rows: list[dict[str, Any]] = []
    one_way = vector.provenance["options"].get("side") == "toward"
    for sign in (1,) if one_way else (1, -1):
        row: dict[str, Any] = {
            "kind": "equal damage",
            "behavior": behavior.name,
            "method": vector.provenance["method"],
            "sign": sign,
        }
        for budget in BUDGETS:
            row["budget_p95"] = budget
            try:
                best = tune(
                    lm, behavior, vector, budget, direction="toward" if sign > 0 else "away",
                    layers=[vector.layers], scope=str(vector.scope), seed=SEED,
                ).report  # fmt: skip
            except NoStrengthPasses as refusal:
                row[f"refused at {budget}"] = refusal.found
                continue
            row |= {key: getattr(best, key) for key in TUNED}
            break
        rows.append(row)
    return rows


def curves(
    lm: LanguageModel, behavior: Behavior, vector: VectorSteering, strengths: dict[int, float]
) -> list[dict[str, Any]]:
    """Return the sparsity curve of one vector as one row."""
    case = Case(lm, behavior, vector, max_prompts=32, max_new_tokens=40, seed=SEED)
    curve = sparsity_curve(case, SHARES, strengths=strengths)
    least = {
        f"{order}, {'toward' if sign > 0 else 'away'}, {'restored' if restored else 'raw'}": (
            curve.least(order, sign, restored)
        )
        for order in ORDERS
        for sign in curve.strengths
        for restored in (False, True)
    }
    row = {"kind": "curve", "behavior": behavior.name, "method": vector.provenance["method"]}
    return [{**row, "least": least, **curve.to_dict()}]


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Write a curve's points as share -> score, low, high, coherence, one table per kind."""
    if row["kind"] != "curve":
        return row
    points: dict[str, dict[str, list[float]]] = {}
    for point in row["points"]:
        side = "toward" if point["sign"] > 0 else "away"
        name = f"{point['order']}, {side}, {'restored' if point['restored'] else 'raw'}"
        figures = [round(point[key], 3) for key in ("score", "low", "high", "coherence")]
        points.setdefault(name, {})[f"{point['share']:g}"] = figures
    return {**row, "points": points}


def effects_at(
    lm: LanguageModel, behavior: Behavior, vector: VectorSteering, strengths: dict[int, float]
) -> dict[int, torch.Tensor]:
    """Return the dimensions' effects on the train split, each sign at its own strength."""
    train = behavior.split(SEED).train
    runs = [
        run
        for sign, m in strengths.items()
        for run in Case(lm, behavior, vector.at(m), (sign,), 16).runs(train).values()
    ]
    return dimension_effects(lm, runs)


def overlaps(
    lm: LanguageModel,
    behavior: Behavior,
    vectors: dict[str, VectorSteering],
    strengths: dict[str, dict[int, float]],
) -> list[dict[str, object]]:
    """Compare surviving dimensions by three orders, with a random direction among the vectors."""
    made = {name: v.at(max(strengths[name].values())) for name, v in vectors.items()}
    effects = {name: effects_at(lm, behavior, v, strengths[name]) for name, v in vectors.items()}
    model = next(name for name in ("next_token", *vectors) if name in vectors)
    null = random_null(made[model], SEED)
    for times in (1, 2, 4):
        signs = {sign: times * m for sign, m in strengths[model].items()}
        try:
            effects["random"] = effects_at(lm, behavior, null, signs)
        except TrimtabError:  # it changes no token yet
            continue
        made["random"] = null
        break
    rows: list[dict[str, object]] = []
    for order in ("attribution", "slope", "magnitude"):
        scores = {name: dimension_scores(made[name], effects[name], order) for name in effects}
        for share in OVERLAP_SHARES:
            rows += [
                {
                    "kind": "overlap", "behavior": behavior.name, "order": order, "share": share,
                    "permutations": PERMUTATIONS, **asdict(pair),
                }
                for pair in dimension_overlap(scores, share, seed=SEED)
            ]  # fmt: skip
    return rows


def cosines(vectors: dict[str, VectorSteering]) -> dict[str, object]:
    """Cosines of the directions, and the 97.5 % quantile of two random ones' (exact, a beta law)."""
    units = torch.stack([vector.directions[LAYER].double() for vector in vectors.values()])
    half = (units.shape[1] - 1) / 2
    values = (units @ units.T).clamp(-1, 1).tolist()
    null = 2 * float(beta.ppf(0.975, half, half)) - 1
    return {"layer": LAYER, "names": list(vectors), "values": values, "null": null}


def main() -> None:
    """Run everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="what is done is kept here")
    parser.add_argument("--behaviors", nargs="+", choices=TRAINED, default=list(TRAINED))
    given = parser.parse_args()
    folder: Path | None = given.folder
    lm = load("harbor")
    rows: list[dict[str, object]] = []
    for name in given.behaviors:
        behavior = load_behavior(name)
        rows += selection(lm, behavior)
        vectors: dict[str, VectorSteering] = {}
        for method in METHODS:
            try:
                vectors[method] = found(lm, behavior, method, folder)
            except TrimtabError as error:
                refused = {"kind": "refused", "behavior": name, "method": method}
                rows.append({**refused, "found": error.found})
        rows.append({"kind": "cosines", "behavior": name, **cosines(vectors)})
        strengths: dict[str, dict[int, float]] = {}
        for method, vector in vectors.items():
            effects = kept(folder, f"{name}-{method}-tuned", tuned, lm, behavior, vector)
            rows += effects
            found_at = {row["sign"]: abs(row["strength"]) for row in effects if "score" in row}
            if found_at:
                strengths[method] = found_at
        working = {method: vectors[method] for method in strengths}
        for method, vector in working.items():
            at = strengths[method]
            rows += kept(folder, f"{name}-{method}-curve", curves, lm, behavior, vector, at)
        if len(working) > 1:
            rows += overlaps(lm, behavior, working, strengths)
    title = "sparsity and shared dimensions, built-in model"
    emit(title, [compact(row) for row in rows], given.json)


if __name__ == "__main__":
    main()
