"""The other programs' interpreters, greedy decoding of our own, and models they can serve."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

import tiny
from trimtab import behavior, load
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel

HERE = Path(__file__).parent
PROMPTS = 64


def interpreter(name: str) -> Path:
    """The Python of one of the environments that `make test-interop` keeps."""
    return Path(os.environ["TRIMTAB_INTEROP"]) / name / "bin" / "python"


def call(name: str, script: str, asked: dict[str, Any], folder: Path) -> Any:
    """Run a script of this folder by another interpreter: JSON in, JSON out."""
    given, found = folder / "asked.json", folder / "found.json"
    given.write_text(json.dumps(asked))
    found.unlink(missing_ok=True)
    limits = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [interpreter(name), HERE / script, given, found],
        env=os.environ | limits,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(found.read_text())


def harbor() -> tuple[LanguageModel, list[list[int]]]:
    """The built-in model in float32, and 64 of its behaviors' prompts as ids."""
    lm = load("harbor", dtype=torch.float32)
    texts: list[Prompt] = []
    for name in ("refusal", "mood", "topic", "register"):
        made = behavior(name)
        texts += [example.prompt for example in (*made.toward[:8], *made.away[:8])]
    return lm, [lm.encode(text).ids for text in texts[:PROMPTS]]


def random_model(config: PretrainedConfig, seed: int = 0) -> tuple[LanguageModel, list[list[int]]]:
    """A random model with heads wide enough for the runtimes, and 64 random prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.1))
        prompts = [torch.randint(6, 340, (5 + n % 20,)).tolist() for n in range(PROMPTS)]
    return LanguageModel(model, tiny.tokenizer(), f"random-{config.model_type}"), prompts


def directions(lm: LanguageModel, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    drawn = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    return {layer: c / c.norm() for layer, c in drawn.items()}


@torch.no_grad()
def greedy(lm: LanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The most likely tokens, one prompt at a time, ends of text included."""
    answers = []
    for prompt in prompts:
        ids, cache, answer = torch.tensor([prompt]), None, []
        for _ in range(new):
            out = lm.model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            answer.append(int(ids))
        answers.append(answer)
    return answers
