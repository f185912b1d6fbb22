"""What the benchmarks share: models, interleaved timing, and one JSON form with named baselines."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel

WORDS = (
    "the ferry harbor ledger cat sleeps pier noon asks please how borrow today kindly town".split()
)


def random_llama(layers: int = 8, width: int = 256, seed: int = 0) -> LanguageModel:
    """Build a random Llama with a word tokenizer; no token ends an answer."""
    words = ["<pad>", "<unk>", *WORDS, *(f"word{i}" for i in range(1000))]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return LanguageModel(model, tokenizer, f"random Llama, {layers} layers, width {width}")


def benched_models() -> list[LanguageModel]:
    """Return the random Llama, and the built-in model where its weights are there."""
    found = [random_llama()]
    try:
        found.append(load("harbor"))
    except (TrimtabError, ImportError):
        pass
    return found


@dataclass
class Times:
    """Seconds of each round: on the clock, and of this process on the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Time each run `repeats` times in turn, after one round that does not count."""
    times = {name: Times() for name in runs}
    for round_ in range(repeats + 1):
        # The order turns round, so that nobody always follows the same neighbor.
        names = list(runs)[round_ % len(runs) :] + list(runs)[: round_ % len(runs)]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            if round_:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def compared(times: Mapping[str, Times], baseline: str) -> list[dict[str, object]]:
    """Return one row per run: median seconds, and medians of the rounds' ratios to the baseline.

    On a machine that does other work too, the processor's ratio is the steadier one; it says
    nothing about a run on a GPU.
    """
    return [
        {
            "name": name,
            "median_s": statistics.median(found.wall),
            "time_over_baseline": _ratio(found.wall, times[baseline].wall),
            "cpu_time_over_baseline": _ratio(found.cpu, times[baseline].cpu),
        }
        for name, found in times.items()
    ]


def _ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def emit(title: str, results: list[dict[str, object]], path: Path | None) -> None:
    """Print the results as JSON, and write them to `path` where one is given."""
    machine = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps({"bench": title, "setting": machine, "results": results}, indent=2)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)


def arguments(description: str, repeats: int) -> argparse.Namespace:
    """Read `--json FILE` and `--repeats N`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    return parser.parse_args()
