"""Routes, one by one: what they store, and that the plan chooses and names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import at_every_writer, bake, plan
from trimtab.weights.disk.base import save_model
from trimtab.weights.routes.constant import post_norm_constant

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def steering(lm: LanguageModel, layers=(1,), alpha=0.8, **how) -> VectorSteering:
    each = {layer: direction(layer) for layer in layers}
    return VectorSteering.from_directions(lm, each, alpha, **how)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "granite", "mixtral", "phi3"])
@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
def test_a_null_block_can_be_asked_for(tmp_path, name, site):
    lm = tiny.language_model(name)
    report = bake(lm, steering(lm, (0, 2), site=site), tmp_path / "out", route="null_block")
    assert "block" in report.route and report.plan is not None and report.plan.extra_layers == 2
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5
    assert (report.steering_effect or 0) > 0.1


def test_qwen2_keeps_its_name_with_a_null_block_and_becomes_llama_without(tmp_path):
    lm = tiny.language_model("qwen2")
    assert bake(lm, steering(lm), tmp_path / "a").route == "conversion to Llama + bias"
    bake(lm, steering(lm), tmp_path / "b", route="null_block")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["num_hidden_layers"] == tiny.LAYERS + 1
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    block = "model.layers.2.self_attn."
    assert tensors[block + "v_proj.bias"].tolist() == [1.0] + [0.0] * 15
    assert torch.allclose(tensors[block + "o_proj.weight"][:, 0], 0.8 * direction(1), atol=1e-6)
    assert not tensors[block + "o_proj.weight"][:, 1:].any()


def test_mistral_without_a_window_becomes_llama(tmp_path):
    config = tiny.config("mistral")
    config.sliding_window = None
    lm = tiny.language_model(config)
    report = bake(lm, steering(lm, (0, 3)), tmp_path / "out")
    assert report.route == "conversion to Llama + bias"
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "mistral", "phi3", "mixtral"])
def test_a_conversion_alone_changes_nothing(tmp_path, name):
    lm = tiny.language_model(name)
    bake(lm, steering(lm).at(0.0), tmp_path / "out", route="convert")
    converted = load(str(tmp_path / "out"))
    assert type(converted.model) is not type(lm.model)
    assert (converted.next_logits(PROMPTS) - lm.next_logits(PROMPTS)).abs().max() < 2e-6


def test_rotary_embeddings_that_llama_has_not_are_refused_by_name(tmp_path):
    config = tiny.config("phi3")
    # A real one of the family turns only part of each head.
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    lm = tiny.language_model(config)
    found = plan(lm, steering(lm))
    assert not found.exact and "a part of 0.5 of each head" in found.rows[0].reason
    with pytest.raises(TrimtabError, match="part of 0.5"):
        bake(lm, steering(lm), tmp_path / "out")


def test_a_windowed_mixture_is_refused_by_name():
    config = tiny.config("mixtral")
    config.sliding_window = 8
    lm = tiny.language_model(config)
    assert "sliding window of 8 tokens, which GraniteMoe" in plan(lm, steering(lm)).rows[0].reason
    assert plan(lm, at_every_writer(steering(lm))).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [0.02, 1.0, 300.0])
def test_the_post_norm_emits_the_constant(dtype, offset, size):
    constant, eps = size * direction(0).double(), 1e-6
    bias, gain = (t.to(dtype).double() for t in post_norm_constant(constant, offset, eps, dtype))
    made = (gain + offset) * bias / (bias.square().mean() + eps).sqrt()
    assert (made - constant).norm() / constant.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite"])
def test_rounding_in_half_precision_is_that_of_the_dtype(tmp_path, name):
    lm = tiny.language_model(name, dtype=torch.bfloat16)
    report = bake(lm, steering(lm, (1, 2)), tmp_path / "out")
    assert 2**-13 < report.rounding < 2**-7 and report.dtype == "bfloat16"
    assert report.float32_difference is not None and report.max_logit_difference is not None
    assert report.float32_difference < (report.steering_effect or 0) / 20


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    lm = tiny.language_model("llama", dtype=torch.float16)
    with pytest.raises(TrimtabError, match="too large"):
        bake(lm, steering(lm, alpha=1e6), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma3", "granite", "gpt2", "llama"])
def test_embedding_shift_unties_only_where_it_must(tmp_path, name):
    config = tiny.config(name)
    config.tie_word_embeddings = True
    lm = tiny.language_model(config)
    report = bake(lm, steering(lm, (0,), site="embed"), tmp_path / "out")
    assert report.route == "embedding shift"
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5
    baked = load(str(tmp_path / "out"))
    tied = baked.sites.embedding.weight is baked.sites.unembedding.weight
    assert tied == (name == "gpt2")  # its position embeddings take the constant


def test_old_gpt2_files_without_a_prefix(tmp_path):
    lm = tiny.language_model("gpt2")
    save_model(lm, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask, no weight
    save_file(tensors, file, metadata={"format": "pt"})
    vector = replace(steering(lm), fingerprint="")
    report = bake(tmp_path / "base", vector, tmp_path / "out")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5


def test_a_window_that_starts_late_keeps_its_layers(tmp_path):
    config = tiny.config("qwen2")
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 8, 2
    config.layer_types = ["full_attention"] * 2 + ["sliding_attention"] * 2
    lm = tiny.language_model(config)
    report = bake(lm, steering(lm, (0, 2)), tmp_path / "out")
    assert report.route == "null block"
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert made["max_window_layers"] == 3


def test_a_sequential_gpt_neox_has_a_middle(tmp_path):
    config = tiny.config("gpt_neox")
    config.use_parallel_residual = False
    lm = tiny.language_model(config)
    report = bake(lm, steering(lm, (1,), site="resid_mid"), tmp_path / "out")
    assert report.route == "bias of the attention's output"
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5


def test_the_plan_says_what_it_costs_and_why_not(tmp_path):
    lm = tiny.language_model("llama")
    save_model(lm, tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    found = plan(tmp_path / "base", [steering(lm, (0, 1, 3)), steering(lm, scope="last")])
    assert sorted(tmp_path.rglob("*")) == before  # it writes nothing
    good, bad = found.rows
    assert (good.route, good.layers, good.reason) == ("bias", (0, 1, 3), "")
    assert bad.route is None and "every token alike" in bad.reason and "hook" in bad.advice
    assert "refused: weights act" in str(found) and not found.exact
    with pytest.raises(TrimtabError, match="scope last"):
        found.check()
    costed = plan(tmp_path / "base", steering(lm, (0, 1, 3)))
    assert costed.extra_layers == 0 and len(costed.changed) == 3 * tiny.LAYERS
    assert len(costed.steered) == 3 and costed.files_written == 1
    assert "tensors new or changed: 12" in str(costed)
    assert plan(tmp_path / "base", steering(lm), "null_block").extra_layers == 1
    with pytest.raises(TrimtabError, match="no such route"):
        plan(tmp_path / "base", steering(lm), "magic")


def test_a_folder_and_a_loaded_model_give_the_same_checkpoint(tmp_path):
    lm = tiny.language_model("mixtral")
    save_model(lm, tmp_path / "base")
    bake(tmp_path / "base", steering(lm), tmp_path / "a")
    bake(load(str(tmp_path / "base")), steering(lm), tmp_path / "b")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_vectors_of_another_model_are_refused(tmp_path):
    lm, other = tiny.language_model("llama"), tiny.language_model("llama", seed=1)
    save_model(lm, tmp_path / "base")
    with pytest.raises(TrimtabError, match="fingerprint"):
        bake(tmp_path / "base", steering(other), tmp_path / "out")
    narrow = tiny.config("llama")
    narrow.num_hidden_layers = 2
    with pytest.raises(TrimtabError, match="depth 4 instead of 2"):
        bake(tmp_path / "base", steering(tiny.language_model(narrow)), tmp_path / "out")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["base"]


def test_quantized_weights_and_foreign_code_are_refused(tmp_path):
    lm = tiny.language_model("llama")
    for name, value, said in (
        ("quantization_config", {"quant_method": "fp8"}, "quantized weights"),
        ("auto_map", {"AutoModelForCausalLM": "code.Model"}, "code of its own"),
    ):
        folder = tmp_path / name
        save_model(lm, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(TrimtabError, match=said):
            bake(folder, steering(lm), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "site", "route", "said"),
    [
        ("qwen3", "resid_mid", None, True),
        ("qwen3", "resid_mid", "null_block", False),
        ("qwen3", "resid_post", None, False),
        ("mixtral", "resid_post", None, True),
        ("llama", "resid_mid", None, False),
    ],
)
def test_the_plan_names_what_a_server_would_drop(name, site, route, said):
    lm = tiny.language_model(name)
    notes = " ".join(plan(lm, steering(lm, site=site), route=route).notes)
    assert ("o_proj.bias" in notes and "--model-impl transformers" in notes) == said
