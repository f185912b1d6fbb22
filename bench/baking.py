"""Baking out of core: peak memory against the largest tensor, time against copying, kill -9.

Builds a synthetic sharded Llama checkpoint (random tensors written shard by shard, few facts in the
configuration) and bakes three layers. Two bases: one without MLP biases, where the new biases take
one small file, and one with them, where three shards really change. Baselines: the largest tensor
for memory, a plain copy of the changed files for time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from common import emit, random_llama
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake
from trimtab.weights.disk.checkpoint import open_checkpoint

HEADS = 8


def build(folder: Path, gibibytes: float, biased: bool, width: int = 4096, seed: int = 0) -> int:
    """Write a checkpoint of about this size, one block a shard; return its number of blocks."""
    inner, vocabulary = 4 * width, 32000
    block = (4 * width * width + 3 * width * inner) * 2
    ends = 2 * vocabulary * width * 2
    layers = max(4, round((gibibytes * 2**30 - ends) / block))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        mlp_bias=biased,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    needed = layers * block + ends
    if shutil.disk_usage(folder.parent).free < 2.5 * needed:
        raise SystemExit(f"{2.5 * needed / 2**30:.0f} GiB of free disk needed at {folder.parent}")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    random_llama(1, 64).tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def table(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)

    weight_map: dict[str, str] = {}
    count = layers + 2
    for number in range(count):
        if number == 0:
            shards_of = {"model.embed_tokens.weight": table(vocabulary, width)}
        elif number == count - 1:
            norm = torch.ones(width, dtype=torch.bfloat16)
            shards_of = {"lm_head.weight": table(vocabulary, width), "model.norm.weight": norm}
        else:
            shards_of = _block(number - 1, width, inner, biased, table)
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(shards_of, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shards_of, name)
        del shards_of
    index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def _block(layer: int, width: int, inner: int, biased: bool, table) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    ones = torch.ones(width, dtype=torch.bfloat16)
    made = {f"{prefix}self_attn.{p}_proj.weight": table(width, width) for p in "qkvo"}
    made[f"{prefix}mlp.gate_proj.weight"] = table(inner, width)
    made[f"{prefix}mlp.up_proj.weight"] = table(inner, width)
    made[f"{prefix}mlp.down_proj.weight"] = table(width, inner)
    made[f"{prefix}input_layernorm.weight"] = ones
    made[f"{prefix}post_attention_layernorm.weight"] = ones.clone()
    if biased:
        for name, size in (("gate", inner), ("up", inner), ("down", width)):
            made[f"{prefix}mlp.{name}_proj.bias"] = table(size)
    return made


def steering(layers: int, width: int, file: Path, every_writer: bool = False) -> Path:
    """Save a vector at three layers, spread over the depth (or an ablation at three writers)."""
    generator = torch.Generator().manual_seed(1)
    chosen = sorted({0, layers // 2, layers - 1})
    directions = {}
    for layer in chosen:
        drawn = torch.randn(width, generator=generator, dtype=torch.float64)
        directions[layer] = (drawn / drawn.norm()).float()
    VectorSteering(
        directions=directions,
        layers=tuple(chosen),
        scales=dict.fromkeys(chosen, 1.0),
        site="mlp_out" if every_writer else "resid_post",
        operation="ablate" if every_writer else "add",
        n_layers=layers,
        d_model=width,
    ).save(file)
    return file


CHILD = """
import sys, json, resource, time
from pathlib import Path
from trimtab.weights import bake
from trimtab.steering.load import load_steering
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
vector = load_steering(sys.argv[2])
print("ready", flush=True)
start, before = time.perf_counter(), peak()
report = bake(sys.argv[1], vector, sys.argv[3], verify=False)
took = time.perf_counter() - start
print(json.dumps({"seconds": took, "imports": before, "peak": peak(),
    "written": report.plan.bytes_written, "files": report.plan.files_written}))
"""


def child(base: Path, vector: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", CHILD, str(base), str(vector), str(out)]


def copied(base: Path, out: Path, into: Path) -> float:
    """Seconds that a plain copy of the files that the result does not share takes, synced."""
    into.mkdir()
    changed = [p for p in out.glob("*.safetensors") if os.stat(p).st_nlink == 1]
    start = time.perf_counter()
    for file in changed:
        shutil.copyfile(file, into / file.name)
        with open(into / file.name, "rb") as stream:
            os.fsync(stream.fileno())
    took = time.perf_counter() - start
    shutil.rmtree(into)
    return took


def measured(work: Path, name: str, base: Path, vector: Path) -> dict[str, object]:
    """Bake in a process of its own; time it against the copy, in turn, three times."""
    largest = max(fact.nbytes for fact in open_checkpoint(base).tensors.values())
    rounds = []
    for number in range(3):
        out = work / f"{name}-{number}"
        done = subprocess.run(child(base, vector, out), capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        found["copy_seconds"] = copied(base, out, work / "copy")
        rounds.append(found)
        shutil.rmtree(out)
    best = min(rounds, key=lambda found: found["seconds"])
    copy = min(found["copy_seconds"] for found in rounds)
    peak = max(found["peak"] for found in rounds)
    return {
        "name": name,
        "checkpoint_bytes": open_checkpoint(base).nbytes,
        "largest_tensor_bytes": largest,
        "peak_rss_bytes": peak,
        "rss_after_imports_bytes": best["imports"],
        "peak_allowed_bytes": 2 * largest + (300 << 20),
        # The libraries alone take some hundred MiB before anything is opened.
        "peak_over_imports_bytes": peak - best["imports"],
        "bytes_written": best["written"],
        "files_written": best["files"],
        "bake_seconds": best["seconds"],
        "copy_seconds": copy,
        # Of a file of kilobytes neither time is that of copying: a ratio would say nothing.
        "time_over_copy": best["seconds"] / copy if best["written"] > 100 << 20 else None,
    }


def killed(work: Path, base: Path, vector: Path, times: int, seed: int) -> dict[str, object]:
    """Kill the baking at random moments; each leaves the old state or the finished folder."""
    out, states = work / "killed", {"old": 0, "finished": 0}
    draw = random.Random(seed)
    done = subprocess.run(child(base, vector, out), capture_output=True, text=True, check=True)
    whole = float(json.loads(done.stdout.splitlines()[-1])["seconds"])
    sizes = {p.name: p.stat().st_size for p in out.iterdir()}
    sums = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in base.iterdir()}
    shutil.rmtree(out)
    for _ in range(times):
        process = subprocess.Popen(
            child(base, vector, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        process.stdout.readline()  # the libraries are loaded, the baking begins
        time.sleep(draw.uniform(0.0, 1.1 * whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            if {p.name: p.stat().st_size for p in out.iterdir()} != sizes:
                raise SystemExit("half a folder was found")
            states["finished"] += 1
            shutil.rmtree(out)
        else:
            states["old"] += 1
        if {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in base.iterdir()} != sums:
            raise SystemExit("the base was changed")
    subprocess.run(child(base, vector, out), capture_output=True, check=True)
    left = [p.name for p in work.glob(".killed*")]
    shutil.rmtree(out)
    return {"name": "kill -9", "moments": times, **states, "left_after_a_rerun": left}


def peak_of_bake(folder: str, tensors: int, mebibytes: int) -> str:
    """Bake a checkpoint of `tensors` large tensors in this process; for the test of memory."""
    width = 1024
    work = Path(folder)
    layers = build(work / "base", tensors * mebibytes / 1024, False, width=width)
    vector = load_steering(steering(layers, width, work / "v.safetensors", every_writer=True))
    assert isinstance(vector, VectorSteering)
    largest = max(fact.nbytes for fact in open_checkpoint(work / "base").tensors.values())
    before = _status("VmRSS")
    bake(work / "base", vector, work / "out", verify=False)
    after = _status("VmHWM")
    return f"{after - before} {largest}"


def _status(name: str) -> int:
    """Bytes of this process as Linux counts them; unlike ru_maxrss not those of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def main() -> None:
    """Run the three parts and print one JSON."""
    parser = argparse.ArgumentParser(description="Baking out of core.")
    parser.add_argument("--size", type=float, default=8.0, help="GiB of the checkpoint")
    parser.add_argument("--kills", type=int, default=10, help="random moments")
    parser.add_argument("--folder", type=Path, default=None, help="where to work")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # Narrow enough that a small checkpoint has a few blocks as well.
        width = 4096 if options.size >= 4 else 2048
        work, results = Path(folder), []
        for biased in (False, True):
            base = work / f"base-{biased}"
            layers = build(base, options.size, biased, width)
            vector = steering(layers, width, work / "v.safetensors")
            name = "biases there: three shards change" if biased else "new biases: one small file"
            results.append(measured(work, name.split(":")[0].replace(" ", "-"), base, vector))
            if biased:
                projected = steering(layers, width, work / "p.safetensors", every_writer=True)
                results.append(measured(work, "projection-of-three-writers", base, projected))
                results.append(killed(work, base, vector, options.kills, seed=0))
            shutil.rmtree(base)
        emit("baking", results, options.json)


if __name__ == "__main__":
    main()
