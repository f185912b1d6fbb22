"""Edges that carry a steering: attribution against patching, circuits, their exchange, and cost.

Three behaviors, three methods at one layer, scope all. Strengths are chosen on validation prompts by
the judge, edges by attribution on validation prompts; faithfulness is that of test prompts. Baseline
`exact`: patching of the 200 highest and 200 random edges. `--work` keeps the vectors, so that a run
that was cut off goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from common import emit, random_llama
from trimtab.behaviors.file import load_behavior
from trimtab.evaluation.evaluate import Evaluator
from trimtab.mechanism.case import Case
from trimtab.mechanism.circuits.attribution import Attribution, attribute
from trimtab.mechanism.circuits.faithful import Samples, minimal_circuit
from trimtab.mechanism.circuits.interchange import interchange
from trimtab.mechanism.circuits.teacher_forced import token_runs
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import spearman
from trimtab.steering.load import load_steering
from trimtab.steering.nulls import random_null
from trimtab.steering.vector import VectorSteering

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from patching import patch_edges  # noqa: E402

BASELINE = "exact"
BEHAVIORS = ("refusal", "topic", "mood")
METHODS = ("mean_difference", "next_token", "preference")
LAYER, SCOPE = 1, "all"
# Strengths tried: m itself for the mean difference, shares of its own for a trained vector.
GRIDS = {"mean_difference": (4.0, 6.0, 8.0, 10.0, 12.0, 14.0)}
SHARES = (0.75, 1.0, 1.25)
PROMPTS, EDGES, NULLS = 12, 200, 3


def vectors(lm: LanguageModel, name: str, work: Path) -> dict[str, tuple[VectorSteering, dict]]:
    """Find each method's vector and the strength at which it works best on validation prompts."""
    behavior = load_behavior(name)
    judged = Evaluator(lm, behavior.split(0).named("validation"), max_prompts=PROMPTS)
    found: dict[str, tuple[VectorSteering, dict]] = {}
    for method in METHODS:
        file = work / f"{name}_{method}.safetensors"
        if not file.exists():
            find(lm, behavior, method, layers=LAYER, scope=SCOPE).save(file)
        vector = load_steering(file)
        assert isinstance(vector, VectorSteering)
        own = tuple(share * vector.strength for share in SHARES)
        grid = GRIDS.get(method, own)
        scored = judged.run_many(vector, grid, 1)
        rows = [
            {
                "m": m,
                "score": statistics.fmean(one.scores),
                "coherence": statistics.fmean(one.coherences),
            }
            for m, one in zip(grid, scored, strict=True)
        ]
        # Where nothing works, the strength of the trained vectors: the same length of push.
        best = max(rows, key=lambda row: (row["score"] * row["coherence"], -row["m"]))
        if best["score"] == 0:
            best = rows[-1]
        found[method] = vector.at(best["m"]), best
    return found


def agreement(
    lm: LanguageModel, sets: dict, found: Attribution, seed: int = 0
) -> list[dict[str, object]]:
    """Compare attribution with exact patching on the highest and on random edges."""
    generator = torch.Generator().manual_seed(seed)
    order = found.order()
    rest = order[EDGES:]
    drawn = rest[torch.randperm(len(rest), generator=generator)[:EDGES]]
    edges = torch.cat([order[:EDGES], drawn]).tolist()
    rows: list[dict[str, object]] = []
    for name, runs in sets.items():
        own = attribute(lm, runs)
        exact = patch_edges(lm, own.graph, runs, edges)
        scores = own.edges.flatten()[edges]
        cut = {"all": slice(None), "highest": slice(EDGES), "random": slice(EDGES, None)}
        rows.append(
            {
                "set": name,
                "correlation": {
                    k: _correlation(scores[c], exact.effect[c]) for k, c in cut.items()
                },
                "patched_in_only": _correlation(scores, exact.into),
                "patched_out_only": _correlation(scores, exact.out),
                "rank_correlation": spearman(scores, exact.effect),
            }
        )
    return rows


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def study(lm: LanguageModel, name: str, work: Path) -> dict[str, object]:
    """Attribute, patch, cut out circuits and exchange them, for one behavior."""
    chosen = vectors(lm, name, work)
    behavior = load_behavior(name)
    split = behavior.split(0)
    circuits, samples, rows = {}, {}, []
    levers = {method: vector for method, (vector, _) in chosen.items()}
    for method, vector in levers.items():
        case = Case(lm, behavior, vector, (1,), PROMPTS)
        train, held_out = case.runs(split.validation), case.runs(split.test)
        started = time.perf_counter()
        found = attribute(lm, train)
        seconds = time.perf_counter() - started
        on, scored = Samples(lm, found.graph, train), Samples(lm, found.graph, held_out)
        circuit = minimal_circuit(found, on, scored)
        circuits[method], samples[method] = found.top(circuit.size), scored
        row: dict[str, object] = {
            "method": method,
            "strength": chosen[method][1],
            "attribution_s": seconds,
            "tokens": sum(runs.tokens for runs in train.values()),
            "attribution": found.summary(20).to_dict(),
            "circuit": circuit.to_dict(),
        }
        if method == "next_token":
            row["against_exact"] = agreement(lm, train, found)
            row["random_vectors"] = nulls(case, found, circuit.size, scored)
        rows.append(row)
        print(name, method, f"{circuit.share:.3f}", flush=True)
    table = interchange(levers, circuits, samples)
    print(table.table(), table.overlap_table(), flush=True)
    return {"behavior": name, "methods": rows, "interchange": table.to_dict()}


def nulls(case: Case, found: Attribution, size: int, samples: Samples) -> list[dict[str, object]]:
    """Attribute random vectors as long, and run their highest edges under the real vector."""
    rows: list[dict[str, object]] = []
    top = found.top(found.graph.n_edges // 10)
    for seed in range(NULLS):
        null = case.under(random_null(case.vector, seed))
        other = attribute(case.lm, null.runs(case.splits.validation))
        shared = other.top(int(top.sum())) & top
        rows.append(
            {
                "seed": seed,
                "effect": other.effect,
                "samples": other.samples,
                "overlap_of_the_highest_tenth": float(shared.sum()) / float(top.sum()),
                "its_circuit_under_the_vector": vars(samples.faithfulness(other.top(size))),
            }
        )
    return rows


def cost() -> list[dict[str, object]]:
    """Time the attribution of all edges of random models that grow in layers and in tokens."""
    rows: list[dict[str, object]] = []
    for layers, words in ((4, 32), (8, 32), (16, 32), (8, 64), (8, 128), (8, 256)):
        lm = random_llama(layers=layers)
        generator = torch.Generator().manual_seed(0)
        push = {0: torch.randn(lm.d_model, generator=generator)}
        vector = VectorSteering.from_directions(lm, push, alpha=1.0)
        prompts = [" ".join(f"word{(7 * i + k) % 1000}" for i in range(words)) for k in range(8)]
        runs = token_runs(lm, vector, prompts, max_new_tokens=8)
        found, seconds = attribute(lm, runs), []
        for _ in range(3):
            started = time.perf_counter()
            attribute(lm, runs)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        for batch, targets in runs.batches(lm):
            with torch.no_grad():
                lm.forward(batch, targets.keep)
        forward = time.perf_counter() - started
        median = statistics.median(seconds)
        rows.append(
            {
                "layers": layers,
                "tokens": runs.tokens,
                "edges": found.graph.n_edges,
                "seconds": median,
                "edges_per_second": found.graph.n_edges / median,
                "forward_passes": median / forward,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the study and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--work", type=Path, default=Path("build/circuits"), help="keeps vectors")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    lm = load("harbor", dtype=torch.float32)
    results: list[dict[str, object]] = [{"cost": cost(), "baseline": "one forward pass"}]
    for name in BEHAVIORS:
        results.append({"baseline": BASELINE, **study(lm, name, asked.work)})
    emit("circuits", results, asked.json)


if __name__ == "__main__":
    main()
