"""Every lever for three behaviors of the built-in model under two budgets, and what conversions lose.

Levers are found once per behavior (train split), placed per budget (validation), scored on test.
Baseline of every row: the behavior's plain instruction prompt, `score_over_plain` and `calls`; the
null row is a random direction of the vector's size. A journal holds finished cells; the same command
with the same `--journal` goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import emit
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.cli.support import quiet_libraries
from trimtab.evaluation.evaluate import Evaluator
from trimtab.levers import (
    LeversTable,
    compare_levers,
    convert,
)
from trimtab.levers.found import FoundLevers, find_levers
from trimtab.levers.settle import Bench, settle_vector
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.results.journal import Journal
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Steering

BEHAVIORS = ("refusal", "topic", "mood")
BUDGETS = (0.1, 0.5)
PROMPTS, TOKENS, SEED = 24, 32, 0
CONVERTED = 0.5  # the budget at which the vector is converted


def compared(table: LeversTable) -> dict[str, object]:
    """One cell: rows without samples and token lists, with their ratio to the plain prompt."""
    plain = next((row.score for row in table.rows if row.name == "plain prompt"), None)
    cell = table.to_dict()
    rows = cell["rows"]
    assert isinstance(rows, list)
    for row in rows:
        row.pop("samples")
        row.pop("scores")
        row["validation"].pop("scores")
        row["score_over_plain"] = row["score"] / plain if plain else None
    return {"kind": "table", **cell}


def converted(lm: LanguageModel, behavior: Behavior, found: FoundLevers) -> dict[str, object]:
    """The residual of every conversion, with gap and behavior recovered."""
    validation = Evaluator(
        lm, behavior.split(SEED).validation, max_new_tokens=TOKENS, max_prompts=PROMPTS
    )
    bench = Bench(lm, validation, CONVERTED, 1, SEED)
    vector, _ = settle_vector(bench, found.vectors["all"], "all")
    options: dict[str, Any] = {"max_prompts": PROMPTS, "max_new_tokens": TOKENS, "seed": SEED}
    work: dict[str, tuple[Steering | None, str]] = {
        "vector to soft prompt": (vector, "soft"),
        "vector to hard prompt": (vector, "prompt"),
        "vector to weights": (vector, "bias"),
        "vector to rank-1": (vector, "rank-1"),
        "ablation to weights": (vector, "ablation"),
        "prompt to vector": (found.plain, "vector"),
        "soft prompt to vector": (found.soft, "vector"),
        "LoRA to vector": (found.lora, "vector"),
    }
    results: dict[str, object] = {}
    for name, (lever, to) in work.items():
        if lever is None:
            continue
        began = time.process_time()
        figures = convert(lm, behavior, lever, to, **options).to_dict()
        seconds = round(time.process_time() - began, 1)
        results[name] = {"cpu_seconds": seconds, **figures}
    return {
        "kind": "conversions",
        "behavior": behavior.name,
        "vector": f"{vector.label}, layers {list(vector.layers)}",
        "conversions": results,
    }


def at_the_end(lm: LanguageModel, behavior: Behavior) -> dict[str, object]:
    """The plain prompt as a vector of the last prompt token and the answer's tokens."""
    assert behavior.prompt_toward is not None
    found = convert(
        lm,
        behavior,
        PromptSteering(behavior.prompt_toward),
        "vector",
        scope="last",
        max_prompts=PROMPTS,
        max_new_tokens=TOKENS,
        seed=SEED,
    )
    return {
        "kind": "conversions",
        "behavior": behavior.name,
        "conversions": {"prompt to vector (last)": found.to_dict()},
    }


def main() -> None:
    """Fill the cells that the journal does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--journal", type=Path, default=None, help="finished cells; resumes")
    options = parser.parse_args()
    quiet_libraries()
    lm = load("harbor", dtype=torch.float32)
    header = {
        "work": "levers",
        "fingerprint": lm.fingerprint,
        "settings": [BUDGETS, PROMPTS, TOKENS, SEED],
    }
    book = None if options.journal is None else Journal(options.journal, header)
    done = {entry["cell"]: entry["result"] for entry in (book.entries if book else [])}
    results: list[dict[str, object]] = []
    for name in BEHAVIORS:
        behavior = load_behavior(name)
        found: list[FoundLevers] = []

        def levers() -> FoundLevers:
            if not found:  # noqa: B023
                found.append(find_levers(lm, behavior, seed=SEED, progress=tell("finding")))  # noqa: B023
            return found[0]  # noqa: B023

        def tell(what: str) -> Callable[[int, int], None]:
            return lambda n, of: print(f"{name}: {what} {n}/{of}", file=sys.stderr)  # noqa: B023

        cells: dict[str, Callable[[], dict[str, object]]] = {
            f"{name} {budget}": lambda b=budget: compared(
                compare_levers(
                    lm, behavior, budget=b, found=levers(), nulls=2, max_prompts=PROMPTS,  # noqa: B023
                    max_new_tokens=TOKENS, seed=SEED, progress=tell(f"{b:g} nats"),
                )  # noqa: B023
            )
            for budget in BUDGETS
        }  # fmt: skip
        cells[f"{name} conversions"] = lambda: converted(lm, behavior, levers())  # noqa: B023
        cells[f"{name} last"] = lambda: at_the_end(lm, behavior)  # noqa: B023
        for cell, work in cells.items():
            if cell not in done:
                began = time.process_time()
                done[cell] = {**work(), "cpu_seconds": round(time.process_time() - began, 1)}
                if book is not None:
                    book.add({"cell": cell, "result": done[cell]})
            results.append(done[cell])
    emit("levers", results, options.json)


if __name__ == "__main__":
    main()
