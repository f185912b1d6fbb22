"""Stock vLLM on baked checkpoints: the same greedy tokens as transformers with the hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from interop.programs import PROMPTS, call, directions, greedy, harbor, random_model
from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering
from trimtab.weights import bake

NEW = 16


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


def same_tokens(
    lm: LanguageModel, prompts: list[list[int]], vector: VectorSteering, route: str, folder: Path
) -> None:
    with vector.on(lm):
        hooked = greedy(lm, prompts, NEW)
    moved = sum(a != b for a, b in zip(hooked, greedy(lm, prompts, NEW), strict=True))
    assert len(prompts) == PROMPTS and moved > PROMPTS // 2
    report = bake(lm, vector, folder / "baked", route=route, verify=False)
    asked = {
        "model": str(folder / "baked"),
        "prompts": prompts,
        "max_new_tokens": NEW,
        "enforce_eager": True,
        "max_model_len": 256,
    }
    served = call("vllm", "vllm_greedy.py", asked, folder)
    equal = sum(a == b for a, b in zip(hooked, served, strict=True))
    assert equal == PROMPTS, f"{report.route}: {equal} of {PROMPTS} prompts, {moved} moved"


def test_harbor_by_bias(tmp_path):
    lm, prompts = harbor()
    vector = VectorSteering.from_directions(lm, directions(lm, (2, 5)), alpha=600.0)
    same_tokens(lm, prompts, vector, "bias", tmp_path)


@pytest.mark.parametrize(
    ("config", "route"),
    [
        (Qwen2Config(**SIZES), "convert"),
        (Qwen2Config(**SIZES), "null_block"),
        (Qwen3Config(**SIZES, head_dim=32), "null_block"),
    ],
    ids=["qwen2-convert", "qwen2-null_block", "qwen3-null_block"],
)
def test_other_routes(tmp_path, config, route):
    lm, prompts = random_model(config)
    vector = VectorSteering.from_directions(lm, directions(lm, (0, 2)), alpha=9.0)
    same_tokens(lm, prompts, vector, route, tmp_path)
    assert lm.model.dtype == torch.float32
