"""The verifier and `inspect`: what would be dropped on loading is found, by name."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake, inspect_checkpoint, verify
from trimtab.weights.disk.base import save_model

bake_module = importlib.import_module("trimtab.weights.bake")
STRAY = "model.layers.1.mlp.down_proj.bias"


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def steering(lm, layers=(1, 2), **how) -> VectorSteering:
    return VectorSteering.from_directions(lm, {n: direction(n) for n in layers}, 0.8, **how)


def add_tensor(folder, name: str, value: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "phi3", "olmo2"])
def test_the_stray_bias_is_dropped_by_loading_and_told(tmp_path, caplog, name):
    lm = tiny.language_model(name)
    folder = tmp_path / "handmade"
    save_model(lm, folder)
    assert inspect_checkpoint(folder).sound
    add_tensor(folder, STRAY, 5.0 * direction(0))
    # The trap: it loads, and it is not steered at all.
    loaded = load(str(folder))
    torch.testing.assert_close(loaded.next_logits(["Cats?"]), lm.next_logits(["Cats?"]))
    assert loaded.fingerprint == lm.fingerprint
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"left out 1 tensor that {type(lm.model).__name__} has no place for ({STRAY})" in said
    found = inspect_checkpoint(folder)
    assert not found.sound and found.stray == (STRAY,) and found.missing == ()
    assert STRAY in str(found) and "loading drops 1 tensors" in str(found)


def test_what_belongs_is_not_called_stray(tmp_path):
    for name in tiny.ARCHITECTURES:
        save_model(tiny.language_model(name), tmp_path / name)
        found = inspect_checkpoint(tmp_path / name)
        assert found.known and found.sound, (name, found)
    save_model(tiny.language_model("llama"), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    found = inspect_checkpoint(tmp_path / "x")
    assert len(found.missing) == 9 and "at random" in str(found)


def test_a_stray_tensor_in_the_base_is_refused(tmp_path):
    lm = tiny.language_model("qwen2")
    save_model(lm, tmp_path / "base")
    add_tensor(tmp_path / "base", STRAY, direction(0))
    with pytest.raises(TrimtabError, match="does not know") as caught:
        bake(tmp_path / "base", steering(lm), tmp_path / "out")
    assert STRAY in caught.value.found


def test_the_verifier_finds_a_stray_tensor_in_the_result(tmp_path, monkeypatch):
    lm = tiny.language_model("qwen2")
    honest = bake_module.write

    def write(draft, folder, *rest):
        honest(draft, folder, *rest)
        add_tensor(folder, "model.layers.1.mlp.extra.bias", direction(0))

    monkeypatch.setattr(bake_module, "write", write)
    with pytest.raises(TrimtabError, match="does not know and drops"):
        bake(lm, steering(lm), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_reload_itself_reports_unknown_keys(tmp_path):
    lm = tiny.language_model("qwen2")
    save_model(lm, tmp_path / "base")
    add_tensor(tmp_path / "base", STRAY, direction(0))
    with pytest.raises(TrimtabError, match="unexpected_keys"):
        verify.load_model(verify.Base(tmp_path, tmp_path), tmp_path / "base")


def test_inspect_tells_what_was_baked_in_and_before(tmp_path):
    lm = tiny.language_model("llama")
    made = replace(steering(lm), provenance={"behavior": "mood", "method": "pca"})
    bake(lm, made, tmp_path / "once")
    once = load(str(tmp_path / "once"))
    bake(tmp_path / "once", steering(once, (0,)), tmp_path / "twice")
    found = inspect_checkpoint(tmp_path / "twice")
    assert found.sound and found.baked is not None and found.architecture == "LlamaForCausalLM"
    assert found.baked["base_fingerprint"] == once.fingerprint
    assert found.baked["earlier"]["base_fingerprint"] == lm.fingerprint
    text = str(found)
    assert "mood pca m=+1" in text and "from once" in text and "tiny-llama" in text
    assert str(tmp_path) not in (tmp_path / "twice" / "trimtab_bake.json").read_text()


def test_inspect_of_other_architectures_says_that_it_does_not_know(tmp_path):
    lm = tiny.language_model("llama")
    save_model(lm, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config |= {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "x")
    assert not found.known and "not checked" in str(found)
    with pytest.raises(TrimtabError, match="routes only for"):
        bake(tmp_path / "x", replace(steering(lm), fingerprint=""), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mixtral", "gpt2", "phi3"])
@pytest.mark.parametrize("layers", [(0, 3), (3,)])
def test_a_slice_stands_for_a_model_too_large_to_load(tmp_path, monkeypatch, name, layers):
    lm = tiny.language_model(name)
    save_model(lm, tmp_path / "base")
    monkeypatch.setattr(bake_module, "fits_memory", lambda _: False)

    def whole(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(bake_module, "compare_models", whole)
    report = bake(tmp_path / "base", steering(lm, layers), tmp_path / "out")
    assert "slice of two blocks" in report.verified and report.equal_text is None
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5
    assert (report.steering_effect or 0) > 0.1 and report.tensors_compared > 40
    assert "slice of two blocks" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_slice_finds_a_wrong_constant(tmp_path, monkeypatch):
    lm = tiny.language_model("llama")
    honest = bake_module.write_slices

    def slices(draft, building, vectors):
        folders, moved = honest(draft, building, vectors)
        return folders, [v.at(2.0) for v in moved]

    monkeypatch.setattr(bake_module, "write_slices", slices)
    with pytest.raises(TrimtabError, match="logits that differ"):
        bake(lm, steering(lm), tmp_path / "out", verify="slice")
    assert list(tmp_path.iterdir()) == []


def test_a_model_larger_than_the_memory_does_not_fit():
    assert verify.fits_memory(1 << 20)
    assert not verify.fits_memory(1 << 60)


def test_in_a_mixture_of_half_precision_the_median_token_decides(tmp_path):
    lm = tiny.language_model("mixtral", dtype=torch.bfloat16)
    report = bake(lm, steering(lm), tmp_path / "out")
    assert report.max_logit_difference is not None and report.float32_difference is not None
    base = verify.Base(tmp_path, tmp_path, dtype=torch.bfloat16, routed=True)
    hooked = torch.zeros(10, 4)
    one = hooked.clone()
    one[3] = 9.0
    assert verify._judge(report, base, hooked, one, hooked).max_logit_difference == 9.0
    with pytest.raises(TrimtabError, match="differ by 9"):
        verify._judge(report, base, hooked, hooked + 9.0, hooked)
    with pytest.raises(TrimtabError, match="differ by 9"):
        verify._judge(report, replace(base, routed=False), hooked, one, hooked)
