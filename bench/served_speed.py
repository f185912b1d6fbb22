"""What a steering costs once it is weights: greedy generation in transformers, and in vLLM.

Baseline `base`: the checkpoint that was baked from. `baked` has the steering in biases of its MLPs
(Harbor, route bias: every MLP gets three biases, two of them zero). `base_again` is a second copy
of the baseline: what its ratio shows is the machine's noise. `hook` is the same steering by hook,
in transformers. Every run writes the same few tokens, so that neighbors meet the same machine.
`--vllm` is a Python that has vLLM, which compiles, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import Times, compared, emit, interleaved
from trimtab import harbor
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake

BASELINE = "base"
LAYERS, ALPHA = (2, 5), 250.0
PROMPT = "How do I borrow the harbor ledger today?"
NEW_TOKENS = 8
BATCHES = (1, 16)
ROUNDS = Path(__file__).with_name("vllm_rounds.py")


def generate(lm: LanguageModel, ids: list[list[int]]) -> None:
    """Write exactly NEW_TOKENS tokens for every prompt."""
    prompts = torch.tensor(ids)
    model: Any = lm.model  # the type of modules says nothing of `generate`
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )


def hooked(lm: LanguageModel, vector: VectorSteering, ids: list[list[int]]) -> None:
    with vector.on(lm):
        generate(lm, ids)


def rows(times: dict[str, Times]) -> list[dict[str, object]]:
    """Every run beside the baseline, with what its ratios spread over."""
    made = compared(times, BASELINE)
    for row in made:
        mine, theirs = times[str(row["name"])], times[BASELINE]
        row["rounds"] = len(mine.wall)
        for clock in ("wall", "cpu"):
            pairs = zip(getattr(mine, clock), getattr(theirs, clock), strict=True)
            row[clock] = spread([a / b for a, b in pairs])
    return made


def spread(ratios: list[float]) -> dict[str, list[float]]:
    """Quartiles of the rounds, and a 95% interval of their median, by ranks."""
    ordered, half = sorted(ratios), len(ratios) / 2
    reach = 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(half - reach)), min(len(ratios) - 1, int(half + reach))
    first, _, third = statistics.quantiles(ordered, n=4)
    return {"quartiles": [first, third], "median_95": [ordered[low], ordered[high]]}


def in_transformers(
    folders: dict[str, Path], vector: VectorSteering, repeats: int
) -> list[list[dict[str, object]]]:
    """Time the checkpoints in this process; one list of rows a batch."""
    models = {name: load(folder, dtype=torch.float32) for name, folder in folders.items()}
    found = []
    for batch in BATCHES:
        ids = [models[BASELINE].encode(PROMPT).ids] * batch
        runs: dict[str, Callable[[], object]] = {
            name: partial(generate, lm, ids) for name, lm in models.items()
        }
        runs["hook"] = partial(hooked, models[BASELINE], vector, ids)
        found.append(rows(interleaved(runs, repeats)))
    return found


def in_vllm(
    python: Path, folders: dict[str, Path], ids: list[int], repeats: int
) -> list[list[dict[str, object]]]:
    """Time the checkpoints in vLLM, each in an engine of its own, taking turns."""
    limits = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    request = {
        "models": {name: str(folder) for name, folder in folders.items()},
        "prompt": ids,
        "batches": BATCHES,
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
    }
    with tempfile.TemporaryDirectory() as made:
        asked, found = Path(made) / "asked.json", Path(made) / "found.json"
        asked.write_text(json.dumps(request))
        # What vLLM says goes where progress goes: standard output is this benchmark's JSON.
        command = [python, ROUNDS, asked, found]
        subprocess.run(command, env=os.environ | limits, check=True, stdout=sys.stderr)
        batches: list[dict[str, dict[str, list[float]]]] = json.loads(found.read_text())
    return [rows({name: Times(**each) for name, each in times.items()}) for times in batches]


def main() -> None:
    """Time base, its copy and the baked checkpoint wherever they can be run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=250, help="timed rounds")
    parser.add_argument("--vllm", type=Path, default=None, help="a Python that has vLLM")
    options = parser.parse_args()
    lm = load("harbor")
    generator = torch.Generator().manual_seed(0)
    drawn = {layer: torch.randn(lm.d_model, generator=generator) for layer in LAYERS}
    unit = {layer: c / c.norm() for layer, c in drawn.items()}
    vector = VectorSteering.from_directions(lm, unit, alpha=ALPHA)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "baked"
        bake("harbor", vector, out, route="bias", verify=False)
        folders = {BASELINE: harbor.path(), "baked": out, "base_again": harbor.path()}
        programs: dict[str, Callable[[], list[list[dict[str, object]]]]] = {
            "transformers": partial(in_transformers, folders, vector, options.repeats)
        }
        if options.vllm is not None:
            ids = lm.encode(PROMPT).ids
            programs["vllm"] = partial(in_vllm, options.vllm, folders, ids, options.repeats)
        for program, run in programs.items():
            before = os.getloadavg()[0]
            found = run()
            setting = {
                "program": program,
                "model": lm.name,
                "new_tokens": NEW_TOKENS,
                "baseline": BASELINE,
                "load_before_and_after": [before, os.getloadavg()[0]],
            }
            results += [
                setting | {"batch": batch, "runs": table}
                for batch, table in zip(BATCHES, found, strict=True)
            ]
    emit("served_speed", results, options.json)


if __name__ == "__main__":
    main()
