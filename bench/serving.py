"""What steering costs in vLLM, compiled: throughput beside the same vLLM without the plugin.

Baseline `base`: vLLM, no plugin. `base_again`: another such engine; what its ratio shows is the
machine's noise. `loaded`: the plugin with a folder of vectors that no request asks for. `steered`:
the same engine, every row steered. `every_layer`: a vector that is added behind every layer, every
row steered. Engines take turns, each with processes of its own, so that neighbors meet the same
machine; ratios of throughput are those of the rounds' times, upside down.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from common import Times, emit
from trimtab import harbor
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

ENGINE = Path(__file__).with_name("serving_engine.py")
ROOT = Path(__file__).parents[1]
BASELINE = "base"
PROMPT = "How do I borrow the harbor ledger today?"
NEW_TOKENS = 16
BATCHES = (8, 64)
WARM = 3
PATIENCE = 600.0
ONE, EVERY = "one", "every"


@dataclass(frozen=True)
class Run:
    """What is timed: an engine, and what its rows ask for."""

    engine: str
    steer: str | None = None


RUNS = {
    BASELINE: Run("base"),
    "base_again": Run("base_again"),
    "loaded": Run("plugin"),
    "steered": Run("plugin", "one:1"),
    "every_layer": Run("plugin_every", "every:1"),
}


def vector(lm: LanguageModel, layers: tuple[int, ...], alpha: float) -> VectorSteering:
    generator = torch.Generator().manual_seed(0)
    drawn = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    unit = {layer: c / c.norm() for layer, c in drawn.items()}
    return VectorSteering.from_directions(lm, unit, alpha=alpha)


def start(python: Path, made: Path, folders: dict[str, Path | None]) -> dict[str, TextIO]:
    """Start the engines one after another; the lines to talk to each."""
    info = made / "trimtab-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trimtab\nVersion: 0\n")
    entry = "[vllm.general_plugins]\ntrimtab = trimtab.serve.plugin:register\n"
    (info / "entry_points.txt").write_text(entry)
    limits = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{made}",
    }
    found = {}
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(PATIENCE)
        asked = {"model": str(harbor.path()), "new_tokens": NEW_TOKENS, "max_model_len": 256}
        (made / "asked.json").write_text(json.dumps(asked | {"port": door.getsockname()[1]}))
        for name, folder in folders.items():
            own = {"ENGINE": name} | ({} if folder is None else {"TRIMTAB_STEER": str(folder)})
            command = [str(python), str(ENGINE), str(made / "asked.json")]
            # They end when their line is closed. Standard output is this benchmark's JSON.
            subprocess.Popen(command, env=os.environ | limits | own, stdout=sys.stderr, cwd=made)
            connection, _ = door.accept()
            connection.settimeout(PATIENCE)
            lines = connection.makefile("rw")
            assert json.loads(lines.readline())["name"] == name
            found[name] = lines
    return found


def ask(lines: TextIO, prompts: list[list[int]], steer: str | None) -> dict[str, Any]:
    lines.write(json.dumps({"prompts": prompts, "steer": steer}) + "\n")
    lines.flush()
    return json.loads(lines.readline())


def rounds(
    engines: dict[str, TextIO], prompts: list[list[int]], repeats: int
) -> tuple[dict[str, Times], dict[str, Any]]:
    times = {name: Times() for name in RUNS}
    tokens: dict[str, Any] = {}
    names = list(RUNS)
    for round_ in range(repeats + WARM):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            found = ask(engines[RUNS[name].engine], prompts, RUNS[name].steer)
            tokens[name] = found["tokens"]
            if round_ >= WARM:
                times[name].wall.append(found["wall"])
                times[name].cpu.append(found["cpu"])
    return times, tokens


def compared(times: dict[str, Times], rows: int) -> list[dict[str, object]]:
    """Throughput of every run, and over the baseline's with a 95% interval of the median."""
    found = []
    for name, mine in times.items():
        row: dict[str, object] = {
            "name": name,
            "tokens_per_s": rows * NEW_TOKENS / statistics.median(mine.wall),
            "rounds": len(mine.wall),
        }
        for clock, key in (("wall", "throughput_over_base"), ("cpu", "cpu_throughput_over_base")):
            pairs = zip(getattr(times[BASELINE], clock), getattr(mine, clock), strict=True)
            ratios = sorted(base / own for base, own in pairs)
            reach = 0.98 * len(ratios) ** 0.5
            low, high = int(len(ratios) / 2 - reach), int(len(ratios) / 2 + reach)
            bounds = [ratios[max(0, low)], ratios[min(len(ratios) - 1, high)]]
            row[key] = {"median": statistics.median(ratios), "median_95": bounds}
        found.append(row)
    return found


def main() -> None:
    """Time every run at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=60, help="timed rounds")
    parser.add_argument("--vllm", type=Path, required=True, help="a Python that has vLLM")
    options = parser.parse_args()
    lm = load("harbor")
    vectors = {ONE: vector(lm, (2,), 400.0), EVERY: vector(lm, tuple(range(lm.n_layers)), 100.0)}
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = Path(folder)
        for name, made_vector in vectors.items():
            made_vector.save(made / name / f"{name}.safetensors")
        folders = {
            "base": None,
            "base_again": None,
            "plugin": made / ONE,
            "plugin_every": made / EVERY,
        }
        engines = start(options.vllm, made, folders)
        for lines in engines.values():
            stack.callback(lines.close)
        for batch in BATCHES:
            before = os.getloadavg()[0]
            prompts = [lm.encode(PROMPT).ids] * batch
            times, tokens = rounds(engines, prompts, options.repeats)
            results.append(
                {
                    "batch": batch,
                    "new_tokens": NEW_TOKENS,
                    "prompt_tokens": len(prompts[0]),
                    "baseline": BASELINE,
                    "load_before_and_after": [before, os.getloadavg()[0]],
                    "same_tokens_as_base": {n: tokens[n] == tokens[BASELINE] for n in RUNS},
                    "runs": compared(times, batch),
                }
            )
    emit("serving", results, options.json)


if __name__ == "__main__":
    main()
