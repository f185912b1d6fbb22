"""Claims about steering strength, tested on the built-in model; norms on twelve random ones too.

- laws: KL against the laws at 0.01, 0.1 and 0.5 nats, its exponent, the order of peaks, the collapse
  token: every single layer and the 40 to 90 % range, three behaviors.
- modes: broadcast (`all`) against `last` at the same m: the paired difference of scores with its
  interval, and the width of the window (strengths with score >= 0.9 and coherence >= 0.9, as a ratio)
  with a bootstrap interval over prompts.
- convention: what |m| = 1 and |m| = 3 do, and where coherence falls under one half.
- norms: whether the mean norm of the stream grows at every layer.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from common import arguments, emit
from trimtab.behaviors.file import load_behavior
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.readout import readout_tokens
from trimtab.evaluation.summary import mean
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.prediction.calibration import calibration
from trimtab.prediction.law_check import check_laws
from trimtab.results.intervals import paired_bootstrap
from trimtab.steering.layers import default_layers
from trimtab.steering.norms import calibrate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny  # noqa: E402

BEHAVIORS = ("refusal", "topic", "mood")
STRENGTHS = tuple(0.75 * 2 ** (i / 2) for i in range(12))  # 0.75 to 34
FLOOR, RESAMPLES = 0.9, 1000
PROMPTS, LAW_PROMPTS, PLACE_PROMPTS = 24, 16, 8


def law_rows(lm, behavior, vector, prompts) -> list[dict[str, object]]:
    """Check the laws at every single layer and the default range."""
    wanted = readout_tokens(lm, behavior).toward
    rows = []
    for layers in [*((k,) for k in sorted(vector.directions)), default_layers(lm.n_layers)]:
        found = check_laws(lm, vector.select(layers=layers), prompts, wanted=wanted, points=2)
        rows.append(
            {
                "layers": list(layers),
                "exponent": found.exponent,
                "peaks": found.peaks,
                "peaks_inside": found.peaks_inside,
                "one_bump": found.one_bump,
                "collapse": found.collapse,
                "collapse_right": found.collapse_right,
                "ratios": {f"{b.prediction} {b.nats:g}": b.ratio for b in found.budgets},
            }
        )
    return rows


def curves(evaluator, vector, layers, scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and coherences `[strengths, prompts]`."""
    placed = vector.select(layers=layers, scope=scope)
    results = evaluator.run_many(placed, STRENGTHS, 1)
    return (
        torch.tensor([r.scores for r in results]),
        torch.tensor([r.coherences for r in results]),
    )


def width(scores: torch.Tensor, coherences: torch.Tensor) -> float:
    """Return highest over lowest strength of the longest run that passes; 0 without one, 1 for one."""
    passes = ((scores.mean(1) >= FLOOR) & (coherences.mean(1) >= FLOOR)).tolist()
    best, start = 0.0, None
    for i, ok in enumerate([*passes, False]):
        if ok and start is None:
            start = i
        if not ok and start is not None:
            best, start = max(best, STRENGTHS[i - 1] / STRENGTHS[start]), None
    return best


def modes(evaluator, vector, layers) -> dict[str, object]:
    """Compare the two injection modes on the same prompts."""
    both = {scope: curves(evaluator, vector, layers, scope) for scope in ("all", "last")}
    n = both["all"][0].shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, list[float]] = {"all": [], "last": []}
    for _ in range(RESAMPLES):
        pick = torch.randint(0, n, (n,), generator=generator)
        for scope, (s, c) in both.items():
            drawn[scope].append(width(s[:, pick], c[:, pick]))
    ratio = torch.tensor(drawn["last"]).log2() - torch.tensor(drawn["all"]).log2()
    ratio = ratio[ratio.isfinite()]
    return {
        "layers": list(layers),
        "rows": [
            {
                "m": m,
                **{
                    f"{scope}_{what}": float(values[i].mean())
                    for scope, pair in both.items()
                    for what, values in zip(("score", "coherence"), pair, strict=True)
                },
                "difference": float((both["all"][0][i] - both["last"][0][i]).mean()),
                "difference_95": paired_bootstrap(both["all"][0][i], both["last"][0][i]),
            }
            for i, m in enumerate(STRENGTHS)
        ],
        "width": {scope: width(*pair) for scope, pair in both.items()},
        "width_95": {
            scope: [float(torch.tensor(v).quantile(q)) for q in (0.025, 0.975)]
            for scope, v in drawn.items()
        },
        "log2_last_over_all_95": [float(ratio.quantile(q)) for q in (0.025, 0.975)]
        if len(ratio) > RESAMPLES / 2
        else None,
    }


def norms() -> list[dict[str, object]]:
    """Profile the built-in model and the random ones."""
    rows = []
    for lm in [load("harbor", dtype=torch.float32), *map(tiny.language_model, tiny.ARCHITECTURES)]:
        profile = list(calibrate(lm).mean.values())
        steps = [b / a for a, b in zip(profile, profile[1:], strict=False)]
        rows.append(
            {
                "model": lm.name,
                "norms": profile,
                "grows": all(step > 1 for step in steps),
                "smallest_step": min(steps),
            }
        )
    return rows


def main() -> None:
    """Run every check."""
    options = arguments(__doc__ or "", repeats=1)
    lm = load("harbor", dtype=torch.float32)
    results: list[dict[str, object]] = [{"claim": "norms always grow", "rows": norms()}]
    for name in BEHAVIORS:
        behavior = load_behavior(name)
        test = behavior.split(0).named("test")
        known = Unsteered(lm, 40)
        evaluator = Evaluator(lm, test, max_prompts=PROMPTS, unsteered=known)
        prompts = evaluator.prompts(evaluator.scored(1))
        vector = find(lm, behavior, scope="all")
        trained = find(lm, behavior, "next_token")
        print(name, file=sys.stderr, flush=True)
        found = calibration(lm, test, vector, max_prompts=PLACE_PROMPTS, unsteered=known)
        results.append(
            {
                "behavior": name,
                "laws": law_rows(lm, behavior, vector, prompts[:LAW_PROMPTS]),
                "modes": {
                    "mean_difference, 40-90 %": modes(
                        evaluator, vector, default_layers(lm.n_layers)
                    ),
                    "mean_difference, layer 3": modes(evaluator, vector, (3,)),
                    "next_token": modes(evaluator, trained, trained.layers),
                },
                "convention": [
                    {
                        "layers": list(place.layers),
                        "scope": place.scope,
                        "sign": place.sign,
                        "score_1": place.at(1.0).score,
                        "coherence_1": place.at(1.0).coherence,
                        "score_3": place.at(3.0).score,
                        "coherence_3": place.at(3.0).coherence,
                        "cliff": place.cliff,
                        "cliff_alpha_over_mu": None
                        if place.cliff is None
                        else place.cliff / math.sqrt(lm.d_model),
                        "cliff_push": place.cliff_push,
                    }
                    for place in found.places
                ],
                "unsteered": mean(evaluator.run(None, 1).scores),
            }
        )
    emit("strength_claims", results, options.json)


if __name__ == "__main__":
    main()
