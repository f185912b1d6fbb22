"""Loading: a checkpoint that is not the model it was saved as is refused, by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import tiny
from trimtab.cli import main
from trimtab.errors import TrimtabError
from trimtab.models import baked as baked_module
from trimtab.models.baked import lost_steering
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.serve.engine import served_model
from trimtab.steering.vector import VectorSteering
from trimtab.weights import SoftPrompt, at_every_writer, bake, bake_prompt
from trimtab.weights.verify import Base, load_model

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]


def saved(model: LanguageModel, folder: Path) -> Path:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def configure(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop(folder: Path, part: str) -> int:
    """Take the tensors with `part` in their names out; return how many there were."""
    file = folder / "model.safetensors"
    before = load_file(file)
    kept = {name: tensor for name, tensor in before.items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return len(before) - len(kept)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(TrimtabError) as caught:
        load(folder)
    assert str(folder) in caught.value.asked
    return caught.value.found


@pytest.fixture
def folder(llama: LanguageModel, tmp_path: Path) -> Path:
    return saved(llama, tmp_path / "model")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """What loading says beside its result."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def without_mlp(folder: Path) -> None:
    assert drop(folder, "model.layers.1.mlp") == 3


def without_head(folder: Path) -> None:
    assert drop(folder, "lm_head") == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            without_mlp,
            "3 tensors that it lacks, which would be random (model.layers.1.mlp.down_proj.weight, "
            "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight)",
        ),
        (
            lambda folder: configure(folder, num_hidden_layers=tiny.LAYERS + 1),
            "9 tensors that it lacks, which would be random (model.layers.4.input_layernorm.weight,"
            " model.layers.4.mlp.down_proj.weight, model.layers.4.mlp.gate_proj.weight and 6 more)",
        ),
        (without_head, "1 tensor that it lacks, which would be random (lm_head.weight)"),
        (
            lambda folder: configure(folder, intermediate_size=40),
            "12 tensors of another shape than config.json says (model.layers.0.mlp.down_proj.weight"
            " [32, 48] instead of [32, 40], ",
        ),
        (
            lambda folder: configure(folder, model_type="bert", architectures=["BertLMHeadModel"]),
            "which would be random (bert.embeddings.LayerNorm.bias, ",
        ),
        (
            lambda folder: configure(folder, model_type="bert"),
            "39 tensors that BertLMHeadModel has no place for (",
        ),
        (
            lambda folder: configure(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
            "which would be random (transformer.h.0.attn.c_attn.bias, ",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused_with_its_tensors(folder, damage, said):
    damage(folder)
    assert said in refusal(folder)


def test_a_lost_expert_is_a_lost_tensor(tmp_path):
    folder = saved(tiny.language_model("mixtral"), tmp_path / "model")
    assert drop(folder, "layers.2.block_sparse_moe.experts.1.w2") == 1
    assert "model.layers.2.mlp.experts.down_proj" in refusal(folder)


def test_the_command_line_refuses_with_one_message(folder, capsys):
    without_mlp(folder)
    with pytest.raises(SystemExit) as end:
        main(["generate", str(folder), "hi"])
    seen = capsys.readouterr()
    assert end.value.code == 2 and seen.out == ""
    assert seen.err.count("error: ") == 1 and seen.err.count("\n") == 3
    assert "model.layers.1.mlp.down_proj.weight" in seen.err


def test_wherever_a_checkpoint_is_loaded_it_is_judged(folder):
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            trust_remote_code=False,
            dtype=torch.float32,
            get_total_num_hidden_layers=lambda: tiny.LAYERS,
            get_hidden_size=lambda: tiny.WIDTH,
        )
    )
    assert served_model(engine).fingerprint == load(folder).fingerprint
    without_mlp(folder)
    with pytest.raises(TrimtabError, match=r"3 tensors that it lacks.*layers\.1\.mlp"):
        served_model(engine)
    with pytest.raises(TrimtabError, match=r"missing_keys.*layers\.1\.mlp"):
        load_model(Base(folder, folder), folder)
    configure(folder, intermediate_size=40)
    with pytest.raises(TrimtabError, match=r"mismatched_keys.*\[32, 48\] instead of \[32, 40\]"):
        load_model(Base(folder, folder), folder)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_checkpoints_load_in_silence(tmp_path, told, name, tied):
    config = tiny.config(name)
    config.tie_word_embeddings = tied
    lm = tiny.language_model(config)
    folder = saved(lm, tmp_path / "model")
    head = load_file(folder / "model.safetensors").keys() & {"lm_head.weight", "embed_out.weight"}
    assert len(head) == (not tied)
    assert load(folder).fingerprint == lm.fingerprint and told() == []


def test_harbor_loads_in_silence(told):
    load("harbor")
    assert told() == []


@pytest.mark.parametrize(
    ("name", "relic"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
    ],
)
def test_relics_that_transformers_ignores_are_not_told(tmp_path, told, name, relic):
    folder = saved(tiny.language_model(name), tmp_path / "model")
    add(folder, **{relic: torch.ones(4)})
    load(folder)
    assert told() == []


def test_tensors_left_out_are_told(llama, folder, told):
    add(folder, **{f"vision_tower.blocks.{n}.weight": torch.ones(2) for n in range(5)})
    assert load(folder).fingerprint == llama.fingerprint
    assert told() == [
        f"the model {str(folder)!r}: left out 5 tensors that LlamaForCausalLM has no place for "
        "(vision_tower.blocks.0.weight, vision_tower.blocks.1.weight, vision_tower.blocks.2.weight "
        "and 2 more)"
    ]


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def steering(lm: LanguageModel, layers=(1, 2), **how) -> VectorSteering:
    return VectorSteering.from_directions(lm, {n: direction(n) for n in layers}, 0.8, **how)


def baked(lm: LanguageModel, out: Path, route: str | None = None, **how) -> Path:
    bake(lm, steering(lm, **how), out, verify=False, route=route)
    return out


def lost(count: int, names: str) -> str:
    return (
        f"{count} tensors of a baked steering that config.json does not switch on ({names}): "
        "the checkpoint would load unsteered"
    )


def test_a_baked_folder_without_its_switch_is_refused_as_unsteered(llama, tmp_path):
    folder = baked(llama, tmp_path / "baked")
    configure(folder, mlp_bias=False)
    mlp = "model.layers.0.mlp"
    names = f"{mlp}.down_proj.bias, {mlp}.gate_proj.bias, {mlp}.up_proj.bias and 9 more"
    assert refusal(folder) == lost(12, names)


@pytest.mark.parametrize(
    ("name", "how", "switch", "bias"),
    [
        ("llama", {"site": "resid_mid"}, {"attention_bias": False}, "self_attn.k_proj.bias"),
        ("qwen3", {"site": "resid_mid"}, {"attention_bias": False}, "self_attn.k_proj.bias"),
        ("qwen3", {}, {"attention_bias": False}, "self_attn.k_proj.bias"),
        ("qwen2", {}, {"mlp_bias": False}, "mlp.down_proj.bias"),
        ("gemma2", {}, {"attention_bias": False}, "self_attn.k_proj.bias"),
        ("mixtral", {}, {"attention_bias": False}, "self_attn.k_proj.bias"),
        ("mixtral", {"site": "mlp_out"}, {"num_hidden_layers": 5, "attention_bias": False}, ""),
    ],
)
def test_every_switch_that_baking_uses(tmp_path, name, how, switch, bias):
    folder = baked(tiny.language_model(name), tmp_path / "baked", **how)
    load(folder)
    configure(folder, **switch)
    found = refusal(folder)
    assert (
        f"of a baked steering that config.json does not switch on (model.layers.0.{bias}" in found
    )
    assert found.endswith("the checkpoint would load unsteered")


@pytest.mark.parametrize(
    ("name", "route"),
    [("llama", "bias"), ("llama", "null_block"), ("qwen2", None), ("qwen2", "null_block")]
    + [("mistral", None), ("phi3", None), ("olmo2", None), ("gemma3", None), ("granite", None)],
)
def test_the_bases_configuration_in_a_baked_folder(tmp_path, name, route):
    lm = tiny.language_model(name)
    folder = baked(lm, tmp_path / "baked", route)
    shutil.copy(saved(lm, tmp_path / "base") / "config.json", folder)
    found = refusal(folder)
    assert "of a baked steering that config.json does not switch on (model.layers." in found


def test_a_layer_too_few_in_a_baked_folder(tmp_path):
    """Tensors that loading renames are baked ones all the same."""
    lm = tiny.language_model("mixtral")
    bake(lm, at_every_writer(steering(lm, (3,)))[2], tmp_path / "baked", verify=False)
    configure(tmp_path / "baked", num_hidden_layers=3)
    assert "that config.json does not switch on (model.layers.3." in refusal(tmp_path / "baked")


def test_baked_tensors_that_are_gone_with_their_switch(llama, tmp_path):
    folder = baked(llama, tmp_path / "baked")
    configure(folder, mlp_bias=False)
    assert drop(folder, "_proj.bias") == 12
    found = refusal(folder)
    assert "12 tensors of a baked steering that are in none of its files" in found
    assert "model.layers.0.mlp.down_proj.bias" in found
    for nothing in (7, [[], 7], {}):  # a record that was written by hand claims nothing either
        (folder / "trimtab_bake.json").write_text(json.dumps({"changed_tensors": nothing}))
        load(folder)
    (folder / "trimtab_bake.json").unlink()
    assert load(folder).fingerprint == llama.fingerprint  # now it claims nothing


def test_the_record_of_a_hub_repository_is_fetched_once_something_is_dropped(tmp_path, monkeypatch):
    asked = []

    def fetch(*what, revision):
        asked.append((*what, revision))
        if what[0] == "owner/plain":
            raise LocalEntryNotFoundError("no such file")
        return str(tmp_path / what[1])

    monkeypatch.setattr(baked_module, "hf_hub_download", fetch)
    (tmp_path / "trimtab_bake.json").write_text(json.dumps({"changed_tensors": ["b", "c"]}))
    assert lost_steering("owner/baked", "main", []) is None and asked == []
    assert lost_steering("owner/plain", None, ["b"]) is None
    lost = lost_steering("owner/baked", "main", ["c", "a"])
    assert lost == ("that config.json does not switch on", ["c"])
    assert asked[1] == ("owner/baked", "trimtab_bake.json", "main")


def test_baked_folders_load_in_silence(llama, tmp_path, told):
    config = tiny.config("llama")
    config.tie_word_embeddings = True
    lm = tiny.language_model(config)
    soft = SoftPrompt(torch.randn(2, tiny.WIDTH))
    bake_prompt(lm, soft, tmp_path / "prompt", verify=False)
    vector = steering(lm, (0,), site="embed")
    bake(lm, vector, tmp_path / "shift", verify=False)
    for folder in (tmp_path / "prompt", tmp_path / "shift", baked(llama, tmp_path / "bias")):
        load(folder)
    # transformers itself keeps apart what differs, whatever the configuration says.
    configure(tmp_path / "shift", tie_word_embeddings=True)
    with vector.on(lm):
        hooked = lm.next_logits(PROMPTS)
    torch.testing.assert_close(load(tmp_path / "shift").next_logits(PROMPTS), hooked)
    configure(tmp_path / "prompt", num_hidden_layers=3)
    assert told() == []
    assert "9 tensors of a baked" in refusal(tmp_path / "prompt")
