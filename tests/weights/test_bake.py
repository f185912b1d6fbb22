"""Baking: the folder, what is refused, and that a failed bake leaves nothing behind."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake

bake_module = importlib.import_module("trimtab.weights.bake")

BIAS = "model.layers.{}.mlp.down_proj.bias"


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lm():
    return tiny.language_model("llama")


@pytest.fixture
def vector(lm):
    return VectorSteering.from_directions(lm, {1: direction(0), 2: direction(1)}, alpha=0.8)


def damaging(monkeypatch, damage):
    """Let every checkpoint be damaged right after it was written."""
    honest = bake_module.write

    def write(draft, folder, *rest):
        honest(draft, folder, *rest)
        damage(Path(folder))

    monkeypatch.setattr(bake_module, "write", write)


def edit_tensors(change):
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def edit_config(**values):
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def test_the_folder_holds_everything_a_server_needs(lm, vector, tmp_path):
    lm.model.generation_config.max_new_tokens = 77
    report = bake(lm, vector, tmp_path / "deep" / "baked")
    out = tmp_path / "deep" / "baked"
    assert report.path == out and not (out / "trimtab_bake.json").is_symlink()
    assert [p.name for p in out.parent.iterdir()] == ["baked"]
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77
    config = json.loads((out / "config.json").read_text())
    assert config["mlp_bias"] is True and config["architectures"] == ["LlamaForCausalLM"]
    assert load(str(out)).tokenizer.chat_template == lm.tokenizer.chat_template
    tensors = load_file(out / "model.safetensors")
    for layer in range(tiny.LAYERS):
        alpha, c = vector.alphas.get(layer, 0.0), vector.directions.get(layer, direction(9))
        assert torch.equal(tensors[BIAS.format(layer)], (alpha * c.double()).float())
        for name in ("gate_proj", "up_proj"):
            assert not tensors[f"model.layers.{layer}.mlp.{name}.bias"].any()


def test_the_card_says_what_and_how_to_undo(lm, vector, tmp_path):
    made = replace(
        vector.at(1.5),
        norms={1: 10.0, 2: 20.0},
        provenance={"behavior": "mood | odd\nname", "method": "pca", "data_hash": "abc123"},
    )
    bake(lm, made, tmp_path / "baked")
    card = (tmp_path / "baked" / "README.md").read_text()
    for said in (
        "tiny-llama",
        lm.fingerprint,
        "mood \\| odd name",
        "pca",
        "abc123",
        "| 1.5 |",
        f"{made.alphas[1]:.4f}",
        f"{made.alphas[2] / 20:.4f}",
        "`model.layers.1.mlp.down_proj.bias`",
        "set those biases to zero",
    ):
        assert said in card, said
    assert str(tmp_path) not in card  # the maker's folders are nobody's business
    assert "base_model:" not in card
    lm.name = "someone/some-llama"
    bake(lm, made, tmp_path / "named")
    assert "\nbase_model: someone/some-llama\n" in (tmp_path / "named" / "README.md").read_text()


def test_undoing_as_the_card_says_gives_the_base_model(lm, vector, tmp_path):
    bake(lm, vector, tmp_path / "baked")
    baked = load(str(tmp_path / "baked"))
    with torch.no_grad():
        for layer in vector.layers:
            baked.model.state_dict()[BIAS.format(layer)].zero_()
    prompts = ["The ferry leaves."]
    # Every weight is the base model's; sums over memory that is mapped from a file may round otherwise.
    base = lm.model.state_dict()
    for name, value in baked.model.state_dict().items():
        assert torch.equal(value, base.get(name, torch.zeros_like(value))), name
    torch.testing.assert_close(baked.next_logits(prompts), lm.next_logits(prompts))


def test_an_existing_folder_is_only_taken_when_empty(lm, vector, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(TrimtabError, match="something there already"):
        bake(lm, vector, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    with pytest.raises(TrimtabError, match="something there already"):
        bake(lm, vector, out / "mine.txt")
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    bake(lm, vector, out)
    assert (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_strength_zero_bakes_the_base_model(lm, vector, tmp_path):
    report = bake(lm, vector.at(0.0), tmp_path / "baked")
    assert report.steering_effect == 0.0
    prompts = ["The ferry leaves."]
    baked = load(str(tmp_path / "baked"))
    assert torch.allclose(baked.next_logits(prompts), lm.next_logits(prompts), atol=1e-6)


def test_verification_can_be_left_out_and_is_then_not_claimed(lm, vector, tmp_path):
    report = bake(lm, vector, tmp_path / "baked", verify=False)
    assert report.max_logit_difference is None and report.equal_text is None
    assert (
        "not checked" in str(report)
        and "not checked" in (tmp_path / "baked" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        # What a loader that does not know the bias does: it is dropped, and logits are unsteered.
        (edit_config(mlp_bias=False), "does not know and drops"),
        (edit_tensors(lambda t: t.pop(BIAS.format(1))), "missing"),
        (
            edit_tensors(lambda t: t.update({BIAS.format(1): t[BIAS.format(2)].clone()})),
            "other values in",
        ),
        (edit_tensors(lambda t: t.update({BIAS.format(1): -t[BIAS.format(1)]})), "other values in"),
        (edit_config(rms_norm_eps=0.5), "logits that differ"),
        (edit_config(num_hidden_layers=3), "does not know and drops"),
    ],
)
def test_a_checkpoint_that_does_not_reload_equal_is_removed(
    lm, vector, tmp_path, monkeypatch, damage, found
):
    damaging(monkeypatch, damage)
    with pytest.raises(TrimtabError, match=found):
        bake(lm, vector, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(lm, vector, tmp_path, monkeypatch):
    def full(_folder: Path) -> None:
        raise OSError("No space left on device")

    damaging(monkeypatch, full)
    with pytest.raises(TrimtabError, match="No space left"):
        bake(lm, vector, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(lm, vector, tmp_path, monkeypatch):
    def interrupted(_folder: Path) -> None:
        raise KeyboardInterrupt

    damaging(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        bake(lm, vector, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_contradictory_generation_config_is_named(lm, vector, tmp_path):
    lm.model.generation_config.do_sample = False
    lm.model.generation_config.temperature = 0.5
    with pytest.raises(TrimtabError, match="generation config"):
        bake(lm, vector, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_adapters_and_quantized_weights_are_refused(lm, vector, tmp_path):
    lm.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(TrimtabError, match="quantized"):
        bake(lm, vector, tmp_path / "baked")
    del lm.model.config.quantization_config
    lm.model.model.layers[0].mlp.adapter = torch.nn.Linear(4, 4)
    made = VectorSteering.from_directions(lm, {1: direction(0)})
    with pytest.raises(TrimtabError, match="mlp.adapter.weight"):
        bake(lm, made, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []
