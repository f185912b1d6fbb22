"""What `tune` chooses, against four ways of choosing that people use, on the same vector and splits.

- `grid` (the baseline of the ratios): 6 layers x 13 strengths with alpha from 0.05 to 3.2 of the
  stream's norm, every cell answered on the validation split; the best score with coherence of at
  least 0.9 wins, ties go to less damage.
- `one_m`: m = 1 at 40 to 90 % of the depth, broadcast, as in norm-calibrated steering.
- `refusal_selection`: one direction by the published selection for refusal directions: layer below
  0.8 L, KL under 0.1 nats when it is ablated everywhere on neutral prompts, a positive effect when
  added, and the lowest readout gap on prompts that show the behavior when ablated; used at one
  class gap.
- `iso_kl`: the vector's own layers at the strength whose p95 KL over 50-token answers to neutral
  prompts is 1 nat.

All are scored on the test split with the same evaluator. Calls are rows put through the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from common import arguments, emit
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.readout import gap as readout_gap
from trimtab.evaluation.summary import mean
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.steering.layers import default_layers
from trimtab.steering.vector import VectorSteering
from trimtab.strength.screen import crossing
from trimtab.strength.tune import Tuned, tune

BUDGET, FLOOR, TOKENS, PROMPTS = 0.5, 0.9, 40, 32
LAYERS, STRENGTHS = 6, 13
VECTORS = (("refusal", "mean_difference"), ("topic", "next_token"), ("mood", "next_token"))


def grid(lm: LanguageModel, validation: Behavior, vector: VectorSteering) -> VectorSteering | None:
    """Answer every cell of layers x strengths on the validation split."""
    evaluator = Evaluator(lm, validation, max_new_tokens=TOKENS, max_prompts=PROMPTS)
    known = sorted(vector.directions)
    places = sorted({known[round(i * (len(known) - 1) / (LAYERS - 1))] for i in range(LAYERS)})
    shares = torch.logspace(math.log10(0.05), math.log10(3.2), STRENGTHS).tolist()
    best: tuple[float, float] | None = None
    chosen = None
    for layer in places:
        for share in shares:
            cell = vector.select(layers=[layer], strength=share * math.sqrt(lm.d_model))
            result = evaluator.run(cell, 1)
            rank = (mean(result.scores), -result.damage(0).mean)
            if mean(result.coherences) >= FLOOR and (best is None or rank > best):
                best, chosen = rank, cell
    return chosen


def one_m(lm: LanguageModel, validation: Behavior, vector: VectorSteering) -> VectorSteering:
    """No choice at all."""
    return vector.select(layers=default_layers(lm.n_layers), scope="all", strength=1.0)


def refusal_selection(
    lm: LanguageModel, validation: Behavior, vector: VectorSteering
) -> VectorSteering | None:
    """Select a layer's direction as published for refusal; None when no layer qualifies."""
    toward, away, neutral = (
        [e.prompt for e in side][:PROMPTS]
        for side in (validation.toward, validation.away, validation.neutral)
    )
    before = lm.next_logits(neutral).double().log_softmax(-1)
    base = float(readout_gap(lm, validation, away).mean())
    every = range(lm.n_layers)
    found: list[tuple[float, VectorSteering]] = []
    for layer in range(int(0.8 * lm.n_layers)):
        c = vector.directions[layer]
        erase = VectorSteering.from_directions(
            lm, dict.fromkeys(every, c), alpha=1.0, operation="ablate"
        )
        add = vector.select(layers=[layer])
        add = add.at(abs(vector.class_gaps[layer]) / vector.scales[layer])
        with erase.on(lm):
            bypass = float(readout_gap(lm, validation, toward).mean())
            q = lm.next_logits(neutral).double().log_softmax(-1)
        kl = float((before.exp() * (before - q)).sum(-1).mean())
        with add.on(lm):
            induced = float(readout_gap(lm, validation, away).mean()) - base
        if kl < 0.1 and induced > 0:
            found.append((bypass, add))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def iso_kl(lm: LanguageModel, validation: Behavior, vector: VectorSteering) -> VectorSteering:
    """Bisect the strength in log steps until p95 KL along neutral answers is 1 nat."""
    prompts = [e.prompt for e in validation.neutral][:PROMPTS]
    reference = Reference(lm, prompts, Unsteered(lm, 50).answers(prompts))
    strengths = [0.25 * 2**i for i in range(10)]
    m = strengths[0]
    for _ in range(3):
        p95 = [summarize(tokens).p95 for tokens in reference.kl_many(vector, strengths)]
        m = crossing(strengths, p95, 1.0)
        strengths = [m * factor for factor in (0.8, 0.93, 1.0, 1.07, 1.2)]
    return vector.at(m)


def main() -> None:
    """Choose in five ways for three behaviors and score each choice on the test split."""
    options = arguments(__doc__ or "", repeats=1)
    lm = load("harbor", dtype=torch.float32)
    results: list[dict[str, object]] = []
    for name, method in VECTORS:
        behavior = load_behavior(name)
        vector = find(lm, behavior, method)
        splits = behavior.split(0)
        test = Evaluator(lm, splits.named("test"), max_new_tokens=TOKENS, max_prompts=PROMPTS)
        ways: dict[str, Callable[[], VectorSteering | None]] = {
            "tune": lambda: tune(lm, behavior, vector, BUDGET, max_prompts=PROMPTS),  # noqa: B023
        }
        for way in (grid, one_m, refusal_selection, iso_kl):
            ways[way.__name__] = lambda way=way: way(lm, splits.named("validation"), vector)  # noqa: B023
        rows: dict[str, dict[str, Any]] = {}
        for label, choose in ways.items():
            started = time.perf_counter()
            refused = ""
            with counting(lm) as calls:
                try:
                    chosen = choose()
                except (TrimtabError, KeyError) as error:
                    chosen, refused = None, str(getattr(error, "found", f"no direction {error}"))
            seconds = time.perf_counter() - started
            rows[label] = {"calls": calls.rows, "seconds": round(seconds, 1)}
            if chosen is None:
                rows[label]["refused"] = refused or "nothing qualifies"
                continue
            if isinstance(chosen, Tuned):
                rows[label]["calls"] = chosen.report.model_calls
            result = test.run(chosen, 1)
            rows[label] |= {
                "layers": list(chosen.layers),
                "scope": str(chosen.scope),
                "strength": chosen.strength,
                "score": mean(result.scores),
                "coherence": mean(result.coherences),
                "damage": result.damage(0).mean,
                "damage_p95": result.damage(0).p95,
            }
        whole = rows["grid"]["calls"]
        for row in rows.values():
            row["calls_over_grid"] = row["calls"] / whole
        results.append({"behavior": name, "method": method, "baseline": "grid", "ways": rows})
    emit("tune", results, options.json)


if __name__ == "__main__":
    main()
