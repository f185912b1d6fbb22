"""Stock vLLM on baked checkpoints: the same greedy tokens as transformers with the hook."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from interop.programs import PROMPTS, call, directions, greedy, harbor, random_model
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake

NEW = 16
FEW = 16
# How vLLM is run: its own modeling code, in the last case transformers' modules.
EAGER, COMPILED, DROPPED, MODULES = "eager", "compiled", "dropped", "modules"

# Heads as wide as vLLM's attention kernels take.
SIZES: dict[str, Any] = {
    "vocab_size": 344,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# vLLM has no Gemma with an unembedding of its own.
GEMMA = SIZES | {
    "head_dim": 32,
    "sliding_window": 64,
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}
GPT2 = GPT2Config(
    vocab_size=344,
    n_embd=128,
    n_layer=4,
    n_head=4,
    n_positions=256,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


@dataclass(frozen=True)
class Case:
    """A baked checkpoint; `config` None is the built-in model."""

    config: PretrainedConfig | None
    route: str | None
    prompts: int = FEW
    site: str = "resid_post"
    alpha: float = 9.0
    runs: tuple[str, ...] = (EAGER,)


QWEN2, QWEN3 = Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=32)
GEMMA1 = GemmaConfig(**SIZES | {"head_dim": 32, "tie_word_embeddings": True})
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None)
CASES = {
    "harbor-bias": Case(None, "bias", PROMPTS, alpha=600.0, runs=(EAGER, COMPILED)),
    "qwen2-convert": Case(QWEN2, "convert", PROMPTS),
    "qwen2-null_block": Case(QWEN2, "null_block", PROMPTS),
    "qwen3-null_block": Case(QWEN3, "null_block", PROMPTS, runs=(EAGER, COMPILED)),
    "qwen3-split_block": Case(QWEN3, "null_block", site="resid_mid"),
    "mistral-convert": Case(MistralConfig(**SIZES, head_dim=32, sliding_window=None), None),
    "granite-bias": Case(GraniteConfig(**SIZES), None),
    "gemma2-null_block": Case(Gemma2Config(**GEMMA), None, alpha=32.0),
    "gemma3-null_block": Case(Gemma3TextConfig(**GEMMA), None, alpha=20.0),
    "olmo2-null_block": Case(Olmo2Config(**SIZES), None),
    "gpt2-bias": Case(GPT2, None),
    # The trap that the plan names: vLLM's own code leaves these biases out without a word.
    "qwen3-output_bias": Case(QWEN3, None, site="resid_mid", runs=(DROPPED, MODULES)),
    "gemma-null_block": Case(GEMMA1, None, alpha=32.0, runs=(DROPPED, MODULES)),
    "mixtral-convert": Case(MIXTRAL, None, runs=(DROPPED, MODULES)),
}


@dataclass
class Served:
    """What transformers and vLLM answered in one case."""

    route: str
    plain: list[list[int]]
    hooked: list[list[int]]
    answers: list[list[list[int]]] = field(default_factory=list)
    compilation: list[int] = field(default_factory=list)


def baked(case: Case, folder: Path) -> tuple[Served, list[dict[str, Any]]]:
    """The checkpoint of a case, its answers without vLLM, and what vLLM is asked."""
    lm, prompts = harbor() if case.config is None else random_model(case.config)
    prompts = prompts[:: PROMPTS // case.prompts]
    layers = (2, 5) if case.config is None else (0, 2)
    vector = VectorSteering.from_directions(
        lm, directions(lm, layers), alpha=case.alpha, site=case.site
    )
    plain = greedy(lm, prompts, NEW)
    with vector.on(lm):
        hooked = greedy(lm, prompts, NEW)
    report = bake(lm, vector, folder, route=case.route, verify=False)
    jobs = [
        {
            "model": str(folder),
            "prompts": prompts,
            "eager": run != COMPILED,
            "options": {"model_impl": "transformers"} if run == MODULES else {},
        }
        for run in case.runs
    ]
    return Served(report.route, plain, hooked), jobs


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> dict[str, Served]:
    """Every case that was asked for, served by one process: vLLM takes long to start."""
    folder = tmp_path_factory.mktemp("vllm")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and "name" in item.callspec.params
    }
    found: dict[str, Served] = {}
    jobs: list[dict[str, Any]] = []
    owners: list[Served] = []
    for name in sorted(chosen):
        found[name], asked = baked(CASES[name], folder / name)
        jobs += asked
        owners += [found[name]] * len(asked)
    asked = {"jobs": jobs, "max_new_tokens": NEW, "max_model_len": 256}
    for owner, answer in zip(owners, call("vllm", "vllm_greedy.py", asked, folder), strict=True):
        owner.answers.append(answer["answers"])
        owner.compilation.append(answer["compilation"])
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_vllm_says_what_the_hook_says(served, record_property, name):
    case, found = CASES[name], served[name]
    moved = sum(a != b for a, b in zip(found.hooked, found.plain, strict=True))
    assert len(found.hooked) == case.prompts and moved > case.prompts // 2
    for run, answers, level in zip(case.runs, found.answers, found.compilation, strict=True):
        whose, meant = ("base", found.plain) if run == DROPPED else ("hook", found.hooked)
        equal = sum(a == b for a, b in zip(meant, answers, strict=True))
        record_property(f"{name} {run}", f"tokens of the {whose}: {equal} of {case.prompts}")
        assert (level > 0) == (run == COMPILED)
        assert equal == case.prompts, f"{found.route}, {run}: {equal} of {case.prompts}"
