"""Law 5: save -> load -> save is byte-identical; a damaged file or another model's is refused."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load, save

import tiny
from trimtab.errors import TrimtabError
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering

STEERINGS = {
    "calibrated": VectorSteering(
        directions={layer: torch.eye(8)[layer] for layer in range(3)},
        layers=(0, 2),
        scales={0: 0.1, 1: 1 / 3, 2: 1e-7},
        strength=-0.7,
        norms={0: 2.0**0.5, 2: 1e20},
        spreads={1: 5e-324},
        provenance={
            "method": "pca",
            "behavior": "höflich",
            "nested": {"b": [1, 2.5, None], "a": {}},
        },
        fingerprint="abc",
        model_name="some/model",
        n_layers=3,
        d_model=8,
    ),
    "affine": VectorSteering(
        directions={1: torch.nn.functional.normalize(torch.arange(1.0, 6.0), dim=0)},
        layers=(1,),
        scales={1: 1.0},
        strength=0.0,
        site="mlp_out",
        operation="affine",
        scope=Scope.parse("[3,17)"),
        targets={1: -0.1},
        n_layers=2,
        d_model=5,
    ),
    "prompt": PromptSteering('Say "no" – politely.\n'),
    "weights": WeightSteering(
        {("mlp", 2): torch.arange(6.0).view(3, 2), ("attention", 10): torch.ones(3, 1)},
        {("mlp", 2): torch.ones(2, 2) / 3, ("attention", 10): -torch.ones(1, 4)},
        -0.3,
        "rank-1",
        {"method": "höflich", "nested": {"b": [1, None]}},
        "abc",
        "some/model",
    ),
}


@pytest.fixture(params=list(STEERINGS))
def steering(request):
    return STEERINGS[request.param]


def test_save_load_save_is_byte_identical(steering, tmp_path):
    first = steering.save(tmp_path / "first.safetensors").read_bytes()
    loaded = load_steering(tmp_path / "first.safetensors")
    assert loaded.save(tmp_path / "second.safetensors").read_bytes() == first
    assert steering.save(tmp_path / "third.safetensors").read_bytes() == first
    if not isinstance(steering, PromptSteering):
        assert loaded.at(1.25).save(tmp_path / "other.safetensors").read_bytes() != first


def test_every_truncation_is_refused(steering, tmp_path):
    whole = steering.save(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TrimtabError):
            load_steering(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(TrimtabError):
        load_steering(path)


def test_a_flipped_bit_anywhere_is_refused(steering, tmp_path):
    whole = steering.save(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "flipped.safetensors"
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(TrimtabError):
            load_steering(path)


def test_a_value_that_is_not_finite_is_refused(tmp_path):
    path = STEERINGS["calibrated"].save(tmp_path / "v.safetensors")
    tensors = load(path.read_bytes())
    start = path.read_bytes().index(save({"x": tensors["direction.0"]})[-32:])
    content = bytearray(path.read_bytes())
    content[start : start + 4] = b"\x00\x00\xc0\x7f"  # a quiet NaN, little-endian
    path.write_bytes(content)
    with pytest.raises(TrimtabError):
        load_steering(path)


def test_the_refusal_is_one_clear_error(tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(STEERINGS["calibrated"].save(tmp_path / "v.safetensors").read_bytes()[:-5])
    with pytest.raises(TrimtabError) as caught:
        load_steering(path)
    assert "half.safetensors" in caught.value.asked
    assert caught.value.found and caught.value.advice


def test_a_write_that_fails_leaves_nothing_behind(steering, tmp_path, monkeypatch):
    def broken(_source, _target):
        raise OSError("the disk went away")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(TrimtabError, match="the disk went away"):
        steering.save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_model_is_refused(tmp_path):
    lm = tiny.language_model("llama")
    direction = {1: torch.ones(lm.d_model)}
    path = VectorSteering.from_directions(lm, direction).save(tmp_path / "v.safetensors")
    loaded = load_steering(path)
    assert isinstance(loaded, VectorSteering)
    with loaded.on(lm):
        pass  # its own model is accepted
    wide, deep = tiny.config("llama"), tiny.config("llama")
    wide.hidden_size *= 2
    deep.num_hidden_layers += 1
    others = {
        "width": tiny.language_model(wide),
        "depth": tiny.language_model(deep),
        "fingerprint": tiny.language_model("llama", seed=1),
    }
    for what, other in others.items():
        before = [len(module._forward_hooks) for module in other.model.modules()]
        with pytest.raises(TrimtabError, match=what):
            loaded.on(other)
        assert [len(module._forward_hooks) for module in other.model.modules()] == before
