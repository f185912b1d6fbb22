"""Edge attribution beside the reference implementation of EAP-IG, on the same quantity.

The reference goes from corrupt tokens to clean tokens by their embeddings, ours from the unsteered
run to the steered one. Both are given the same here: the reference's model is Harbor's blocks after
the steered place, its "embeddings" the streams that enter them, without the steering (corrupt) and
with it (clean), one for each token of each text. Its own code runs unmodified.

Its rule for the integral takes the left ends, k / T, ours the middles, (k + 1/2) / T. Left ends of 2T
steps are left ends and middles of T, so that 2 left(2T) - left(T) is its score by the middle rule.
It scores a key and a value once per query head, ours once per group that shares them: sums of its
edges are compared. Its sign is that of going from clean to corrupt.

Baseline `EAP-IG`. `--reference` is a checkout of its repository (hannamw/EAP-IG), `--python` an
interpreter with torch, "transformer-lens>=2.15,<3" and safetensors; vectors are kept in `--work`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import Times, compared, emit
from eap_ig_bridge import Names, Reference, hand_over
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.attribution import Attribution, attribute
from trimtab.mechanism.circuits.teacher_forced import TokenRuns, scored_prompts, token_runs
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from patching import patch_edges  # noqa: E402

BASELINE = "EAP-IG"
# Behavior, method, site, layer, strength (None: the vector's own), options of the method.
CASES: tuple[tuple[str, str, str, int, float | None, dict[str, Any]], ...] = (
    ("refusal", "mean_difference", "resid_post", 1, 10.0, {}),
    ("topic", "next_token", "resid_post", 1, None, {}),
    ("mood", "next_token", "resid_post", 1, None, {}),
    ("refusal", "next_token", "embed", 0, None, {"init": "random"}),
)
PROMPTS, TRIED, STEPS, EDGES, EXACT = 8, 16, 10, 100, 24
LEFT = (5, 10, 20, 50, 100)
MIDDLE = (5, 10, 50)  # the last counts as converged


def prepared(lm: LanguageModel, case: tuple, work: Path) -> TokenRuns:
    """Find the vector, or read it, and fix the texts."""
    name, method, site, layer, strength, options = case
    behavior = load_behavior(name)
    file = work / f"{name}_{method}_{site}.safetensors"
    if not file.exists():
        find(lm, behavior, method, layers=layer, site=site, scope="all", **options).save(file)
    vector = load_steering(file)
    assert isinstance(vector, VectorSteering)
    chosen = vector if strength is None else vector.at(strength)
    prompts = scored_prompts(behavior.split(0).named("validation"), 1)[:TRIED]
    runs = token_runs(lm, chosen, prompts)
    return runs.subset(range(min(PROMPTS, len(runs.encoded))))


def agreement(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare the scores of the same edges."""
    top = max(1, len(first) // 10)
    highest = [set(x.abs().argsort(descending=True)[:top].tolist()) for x in (first, second)]
    return {
        "correlation": _correlation(first, second),
        "largest_difference": float((first - second).abs().max()),
        "over_largest_score": float((first - second).abs().max() / second.abs().max()),
        "overlap_of_highest_tenth": len(highest[0] & highest[1]) / top,
    }


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


@torch.no_grad()
def logits_apart(lm: LanguageModel, runs: TokenRuns, batch: Any, real: list, folder: Path) -> float:
    """Largest difference of any logit of any text, with and without the steering."""
    theirs = load_file(folder / "described.safetensors")
    found = []
    for name, vector in (("corrupt", runs.vector.at(0.0)), ("clean", runs.vector)):
        with vector.on(lm):
            mine = lm.forward(batch)
        for i, kept in enumerate(real):
            found.append(float((mine[i, kept] - theirs[name][i, : len(kept)]).abs().max()))
    return max(found)


def timed(lm: LanguageModel, runs: TokenRuns, other: Reference, repeats: int) -> dict[str, Times]:
    """All edges in `STEPS` steps, in turn, after one round that does not count."""
    names = [BASELINE, f"{BASELINE}, weights frozen", "trimtab"]
    times = {name: Times() for name in names}
    for turn in range(repeats + 1):
        for name in names[turn % 3 :] + names[: turn % 3]:
            if name == "trimtab":
                wall, cpu = time.perf_counter(), time.process_time()
                attribute(lm, runs, steps=STEPS)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            else:
                said = other.ask("attribute", steps=STEPS, frozen=name != BASELINE)
                wall, cpu = said["wall"], said["cpu"]
            if turn:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def study(lm: LanguageModel, case: tuple, asked: argparse.Namespace) -> dict[str, object]:
    """Put both side by side for one vector."""
    runs = prepared(lm, case, asked.work)
    mine: dict[int, Attribution] = {steps: attribute(lm, runs, steps=steps) for steps in MIDDLE}
    graph = mine[STEPS].graph
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        batch, real = hand_over(lm, graph, runs, folder)
        other = Reference(asked.reference, asked.python, folder)
        names = Names(lm, graph, other.ask("describe"))
        apart = logits_apart(lm, runs, batch, real, folder)
        there = load_file(folder / "described.safetensors")["edges"]
        assert torch.equal(names.ours(there) > 0, graph.edges), "the graphs differ"
        left = {steps: -names.ours(other.left(steps)) for steps in LEFT}
        times = timed(lm, runs, other, asked.repeats)
        exact = patching(lm, runs, mine, left, names, other)
        other.process.terminate()
    kept = graph.edges
    middle = {steps: 2 * left[2 * steps] - left[steps] for steps in MIDDLE}
    whole = middle[MIDDLE[-1]][kept]
    edges = {name: int(there.sum()) for name in times} | {"trimtab": graph.n_edges}
    rows: list[dict[str, Any]] = compared(times, BASELINE)
    for row in rows:
        row["edges"] = edges[row["name"]]
        row["edges_per_second"] = row["edges"] / row["median_s"]
    return {
        "vector": " ".join(map(str, case[:4])),
        "baseline": BASELINE,
        "versions": names.said["versions"],
        "samples": len(runs.encoded),
        "tokens": runs.tokens,
        "effect": mine[STEPS].effect,
        "logits_largest_difference": apart,
        "edges_trimtab": graph.n_edges,
        "edges_reference": int(there.sum()),
        "same_rule": {t: agreement(mine[t].edges[kept], middle[t][kept]) for t in MIDDLE},
        "as_shipped": {t: agreement(mine[t].edges[kept], left[t][kept]) for t in MIDDLE},
        "off_converged": {
            "trimtab": {t: _off(x.edges[kept], whole) for t, x in mine.items()},
            BASELINE: {t: _off(x[kept], whole) for t, x in left.items()},
        },
        "against_exact": exact,
        "time": rows,
    }


def _off(scores: Tensor, whole: Tensor) -> float:
    return float((scores - whole).norm() / whole.norm())


def patching(
    lm: LanguageModel,
    runs: TokenRuns,
    mine: dict[int, Attribution],
    left: dict[int, Tensor],
    names: Names,
    other: Reference,
) -> dict[str, object]:
    """Both against exact patching of the highest and of random edges, and patching against theirs."""
    order = mine[STEPS].order()
    drawn = torch.randperm(len(order) - EDGES, generator=torch.Generator().manual_seed(0))[:EDGES]
    edges = torch.cat([order[:EDGES], order[EDGES:][drawn]]).tolist()
    exact = patch_edges(lm, mine[STEPS].graph, runs, edges)
    cut = {"all": slice(None), "highest": slice(EDGES), "random": slice(EDGES, None)}
    found: dict[str, object] = {}
    for name, scores in (("trimtab", mine[STEPS].edges), (BASELINE, left[STEPS])):
        one = scores.flatten()[edges]
        found[name] = {k: _correlation(one[c], exact.effect[c]) for k, c in cut.items()}
    kept, named = names.alone(edges[:EDGES])
    theirs = -torch.tensor(other.ask("exact", edges=named[:EXACT])["scores"], dtype=torch.float64)
    out = exact.out[[edges.index(edge) for edge in kept[:EXACT]]]
    found["patched_out_here_and_there"] = {"edges": len(out), **agreement(out, theirs)}
    return found


def main() -> None:
    """Run the comparison and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of EAP-IG")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter that can run it")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--work", type=Path, default=Path("build/eap_ig"), help="keeps vectors")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many vectors")
    asked = parser.parse_args()
    for file in (asked.reference / "src" / "eap" / "attribute.py", asked.python):
        if not file.exists():
            parser.error(f"no {file}: give --reference CHECKOUT_OF_EAP-IG --python INTERPRETER")
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    lm = load("harbor", dtype=torch.float32)
    try:
        emit("eap_ig", [study(lm, case, asked) for case in CASES[: asked.cases]], asked.json)
    except TrimtabError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
