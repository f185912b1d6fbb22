"""What carries the steering on the built-in model: parts frozen, both directions, three methods.

For each behavior and method a vector of one layer and scope `all` is found on the train split; its
layer and strength are chosen on the validation split, for each direction by itself; the test split
is scored with each part frozen (baseline: nothing frozen). Also the time of frozen answers over
plain steered ones, and over the same without a cache, as the source has it (baselines named). At
the end, what each vector says through the heads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import trimtab as tt
from common import emit, interleaved
from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.coherence import coherence_for
from trimtab.evaluation.judges import judge_for
from trimtab.mechanism.case import Case
from trimtab.mechanism.circuits.teacher_forced import scored_prompts
from trimtab.mechanism.frozen.freeze import FREEZES, FreezeTable, freeze_table
from trimtab.mechanism.frozen.lanes import lane_answers
from trimtab.mechanism.reading.lens import LensReading
from trimtab.mechanism.reading.value_vector import value_vectors
from trimtab.methods import METHODS
from trimtab.models.model import LanguageModel
from trimtab.passes.rollout import rollout
from trimtab.results.intervals import bounded_interval
from trimtab.steering.vector import VectorSteering

BEHAVIORS = ("refusal", "topic", "mood")
FOUND_BY = ("mean_difference", "next_token", "preference")
PUBLISHED = {"qk": 8.75, "ov": 71.75, "svv": 53.75, "mlp_direct": 44.5}  # arXiv 2604.08524, points
LEAST_GAIN = 20  # points: with less to lose, what is lost says little
TOKENS = 24


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def candidates(lm: LanguageModel, behavior: Behavior, method: str) -> list[VectorSteering]:
    """Find a method's vectors of one layer, scope all, each with the strengths to try."""
    if method == "mean_difference":
        found = tt.find(lm, behavior, method, scope="all")
        return [found.select(layers=(layer,), strength=8.0) for layer in (1, 2, 3, 4)]
    return [tt.find(lm, behavior, method, scope="all", steps=60)]


def choose(
    lm: LanguageModel, behavior: Behavior, vectors: Sequence[VectorSteering], sign: int
) -> tuple[VectorSteering, float]:
    """Return the layer and strength with the best score of coherent answers on validation."""
    data = behavior.split(0).validation
    prompts = scored_prompts(data, sign)[:16]
    judge, coherence = judge_for(data), coherence_for(data)
    best: tuple[float, VectorSteering] | None = None
    for vector in vectors:
        shares = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
        strengths = [sign * share * abs(vector.strength) for share in shares]
        found = rollout(lm, vector, prompts, strengths, max_new_tokens=TOKENS)
        for strength, answers in zip(strengths, found, strict=True):
            scores = [verdict.share(sign) for verdict in judge(prompts, answers)]
            good = [s * c for s, c in zip(scores, coherence(answers), strict=True)]
            value = sum(good) / len(good)
            if best is None or value > best[0] + 1e-9:
                best = value, vector.at(strength)
    assert best is not None
    return best[1], best[0]


def timed(lm: LanguageModel, vector: VectorSteering, behavior: Behavior) -> list[dict]:
    """Time of frozen answers over the baselines."""
    prompts = scored_prompts(behavior.split(0).test, 1)[:16]

    def plain() -> None:
        with vector.on(lm):
            lm.generate(prompts, max_new_tokens=TOKENS)

    runs = {
        "steered, generate": plain,
        "frozen ov, two lanes with caches": lambda: lane_answers(
            lm, vector, prompts, ["ov"], max_new_tokens=TOKENS
        ),
        "frozen ov, without caches": lambda: lane_answers(
            lm, vector, prompts, ["ov"], max_new_tokens=TOKENS, use_cache=False
        ),
    }
    times = interleaved(runs, 3)
    seconds = {name: statistics.median(found.wall) for name, found in times.items()}
    return [
        {"time": name, "median_s": value, "over_generate": value / seconds["steered, generate"]}
        for name, value in seconds.items()
    ]


def plain_table(table: FreezeTable) -> list[dict]:
    """The rows without the answers and the single scores."""
    return [
        {k: v for k, v in asdict(row).items() if k not in ("answers", "scores")}
        for row in table.rows
    ]


def pooled(tables: Sequence[tuple[str, str, FreezeTable]], of: str) -> list[dict]:
    """Points lost over the cases that gain enough; methods are averaged, then prompts are drawn."""
    gaining = [
        (behavior, side, table)
        for behavior, _, table in tables
        for side in table.prompts
        if of in ("all", behavior, "inducing" if side > 0 else "removing")
        and len(table.rows) > 2
        and table.row("steered", side).score.value - table.row("unsteered", side).score.value
        >= LEAST_GAIN
    ]
    results = []
    for name in FREEZES if gaining else ():
        lost: dict[tuple[str, int, int], list[float]] = {}
        for behavior, side, table in gaining:
            pairs = zip(
                table.row("steered", side).scores, table.row(name, side).scores, strict=True
            )
            for i, (whole, frozen) in enumerate(pairs):
                lost.setdefault((behavior, side, i), []).append(whole - frozen)
        means = torch.tensor([statistics.mean(v) for v in lost.values()], dtype=torch.float64)
        low, high = bounded_interval(means, -1.0, 1.0)
        rows = [table.row(name, side) for _, side, table in gaining]
        each = [row.lost.value for row in rows if row.lost is not None]
        nulls = [row.null.value for row in rows if row.null is not None]
        results.append(
            {
                "frozen": name,
                "of": of,
                "points_lost": 100 * float(means.mean()),
                "low": 100 * low,
                "high": 100 * high,
                "cases": len(each),
                "least": min(each),
                "most": max(each),
                "null_points": statistics.mean(nulls) if nulls else None,
                "null_least": min(nulls, default=None),
                "null_most": max(nulls, default=None),
                "published": PUBLISHED.get(name),
            }
        )
    return results


def said(one: LensReading) -> dict:
    """A reading with its first tokens."""
    plain = asdict(one)
    return {**plain, "promoted": one.promoted[:10], "suppressed": one.suppressed[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--prompts", type=int, default=40, help="test prompts a direction")
    parser.add_argument("--nulls", type=int, default=1, help="null runs per freeze")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = tt.load("harbor", dtype=torch.float32)
    results: list[dict] = []
    tables: list[tuple[str, str, FreezeTable]] = []
    for name in BEHAVIORS:
        behavior = tt.behavior(name)
        for method in [m for m in FOUND_BY if m in METHODS]:
            vectors = candidates(lm, behavior, method)
            say(f"{name} {method}: found")
            for sign in (1, -1):
                vector, value = choose(lm, behavior, vectors, sign)
                # Where nothing is gained, nothing can be lost.
                freezes = FREEZES if 100 * value >= LEAST_GAIN else ()
                judged = Case(lm, behavior, vector, (sign,), given.prompts, TOKENS)
                table = freeze_table(judged, freezes=freezes, nulls=given.nulls)
                tables.append((name, method, table))
                say(
                    f"{vector.label} at {vector.layers}, {value:.2f} on validation\n{table.table().to_text(150)}"
                )
                case = {"behavior": name, "method": method, "sign": sign}
                results.append(
                    {
                        **case,
                        "strength": vector.strength,
                        "layers": vector.layers,
                        "validation": value,
                        "prompts": table.prompts[sign],
                        "rows": plain_table(table),
                    }
                )
                read = value_vectors(judged)
                results.append(
                    {
                        **case,
                        "toward": read.toward,
                        "away": read.away,
                        "telling": [read.telling, read.telling_low, read.telling_high],
                        "sums": [said(one) for one in (read.own, read.total, read.random)],
                        "heads": [said(one) for one in read.heads[:8]],
                    }
                )
    for of in ("all", "inducing", "removing", *BEHAVIORS):
        results += pooled(tables, of)
    say("timing")
    behavior = tt.behavior("refusal")
    vector = tt.find(lm, behavior, scope="all").select(layers=(2,), strength=4.0)
    results += timed(lm, vector, behavior)
    emit("freezing attention patterns, values and MLPs of a steered run", results, given.json)


if __name__ == "__main__":
    main()
