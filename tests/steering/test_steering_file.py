"""The steering file: what it holds, how strict it is, that equal content gives equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from trimtab.errors import TrimtabError
from trimtab.steering.load import describe, load_steering
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering


def vector(**changes) -> VectorSteering:
    generator = torch.Generator().manual_seed(0)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
        for layer in range(4)
    }
    values = {
        "directions": directions,
        "layers": (1, 2),
        "scales": {layer: 0.1 * (layer + 1) / 3 for layer in range(4)},
        "strength": -1.5,
        "scope": Scope.parse("[0,5)"),
        "targets": {1: 0.25},
        "norms": {1: 2.5, 2: 1 / 3},
        "class_gaps": {1: 0.7},
        "spreads": {2: 1e-17},
        "provenance": {"method": "mean_difference", "behavior": "mood — “süß”", "seed": 0},
        "fingerprint": "f" * 16,
        "model_name": "tiny",
        "n_layers": 4,
        "d_model": 8,
    }
    return VectorSteering(**(values | changes))


def header_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["trimtab"])


def rewritten(path, header: dict, tensors=None, resign: bool = True):
    """Write a file with this header, with a right checksum computed as docs/format.md says."""
    if tensors is None:
        tensors = vector().directions
    named = {f"direction.{n}" if isinstance(n, int) else n: t for n, t in tensors.items()}
    if resign:
        body = {k: v for k, v in header.items() if k not in ("format", "version", "sha256")}
        sha = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(named):
            shape = json.dumps([name, list(named[name].shape)], separators=(",", ":"))
            sha.update(shape.encode() + named[name].float().numpy().astype("<f4").tobytes())
        header = header | {"sha256": sha.hexdigest()}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    path.write_bytes(save(named, metadata={"trimtab": text}))
    return path


def test_every_field_returns_exactly(tmp_path):
    before = vector()
    after = load_steering(before.save(tmp_path / "v.safetensors"))
    assert isinstance(after, VectorSteering)
    for layer, c in before.directions.items():
        assert torch.equal(after.directions[layer], c)
    for name in (
        "layers scales strength site operation scope targets norms class_gaps spreads provenance "
        "fingerprint model_name n_layers d_model alphas"
    ).split():
        assert getattr(after, name) == getattr(before, name), name


def test_a_prompt_returns_exactly(tmp_path):
    for before in (PromptSteering("Refuse politely.\n“No.”"), PromptSteering("x", 0.0)):
        assert load_steering(before.save(tmp_path / "p.safetensors")) == before


def test_the_file_is_what_the_format_page_says(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    assert header_of(path)["format"] == "trimtab.steering"  # whatever the modules are called
    again = tmp_path / "again.safetensors"
    rewritten(
        again, header_of(path)
    )  # checksum and layout computed by the test, not by the library
    assert again.read_bytes() == path.read_bytes()


def test_bytes_do_not_depend_on_the_order_of_the_dicts(tmp_path):
    one = vector()
    turned = vector(
        directions=dict(reversed(one.directions.items())),
        scales=dict(reversed(one.scales.items())),
        provenance=dict(reversed(one.provenance.items())),
        layers=(2, 1),
    )
    paths = [v.save(tmp_path / f"{i}.safetensors") for i, v in enumerate((one, turned))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_files_are_readable_by_others_and_leave_nothing_beside_them(tmp_path):
    path = vector().save(tmp_path / "new" / "folder" / "v.safetensors")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert os.listdir(path.parent) == ["v.safetensors"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = vector().save(tmp_path / "v.safetensors")
    old = path.read_bytes()

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrimtabError, match="No space left"):
        vector(strength=3.0).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["v.safetensors"]


def test_a_folder_in_the_way_is_refused(tmp_path):
    with pytest.raises(TrimtabError, match="to write"):
        vector().save(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "other"}, "another format"),
        ({"version": 2}, "format version 2"),
        ({"kind": "matrix"}, "kind"),
        ({"surplus": 1}, "surplus"),
        ({"strength": "1"}, "strength"),
        ({"strength": True}, "strength"),
        ({"layers": [1, 9]}, "layers 0 to 3"),
        ({"layers": []}, "at least one layer|directions for the layers"),
        ({"layers": [1.0]}, "layers"),
        ({"scales": {"1": 0.1}}, "no scale"),
        ({"scales": {"1": 0.1, "02": 0.1}}, "'02'"),
        ({"norms": {"9" * 5000: 1.0}}, "layer number"),
        ({"scope": "everything"}, "no such scope"),
        ({"scope": "[0," + "9" * 5000 + ")"}, "scope"),
        ({"site": "attention"}, "no such site"),
        ({"operation": "multiply"}, "no such operation"),
        ({"model": {"name": "x"}}, "fingerprint"),
    ],
)
def test_a_wrong_header_is_refused_even_with_a_right_checksum(tmp_path, change, found):
    path = vector().save(tmp_path / "v.safetensors")
    rewritten(path, header_of(path) | change)
    with pytest.raises(TrimtabError, match=found):
        load_steering(path)


def test_a_missing_field_is_refused(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    header = header_of(path)
    del header["norms"]
    with pytest.raises(TrimtabError, match="norms"):
        load_steering(rewritten(path, header))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, text):
    path = vector().save(tmp_path / "v.safetensors")
    for field in ('"strength":-1.5', '"seed":0'):
        name = field.split(":")[0]
        header = json.dumps(header_of(path), sort_keys=True, separators=(",", ":"))
        assert field in header
        changed = header.replace(field, f"{name}:{text}")
        bad = tmp_path / "bad.safetensors"
        tensors = {f"direction.{k}": c for k, c in vector().directions.items()}
        bad.write_bytes(save(tensors, metadata={"trimtab": changed}))
        with pytest.raises(TrimtabError, match="plain JSON"):
            load_steering(bad)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({0: torch.ones(8), 1: torch.ones(8) / 8**0.5, 2: torch.ones(8) / 8**0.5}, "length 2.8"),
        ({1: torch.full((8,), float("nan")), 2: torch.ones(8) / 8**0.5}, "not finite"),
        ({1: torch.ones(16) / 4, 2: torch.ones(16) / 4}, r"shape \[16\]"),
        ({1: torch.ones(8) / 8**0.5}, "directions for the layers"),
        ({1: (torch.ones(8) / 8**0.5).half(), 2: torch.ones(8) / 8**0.5}, "float16"),
        ({"other": torch.ones(8) / 8**0.5}, "'other'"),
        (
            {1: torch.ones(8) / 8**0.5, 2: torch.ones(8) / 8**0.5, 7: torch.ones(8) / 8**0.5},
            "0 to 3",
        ),
    ],
)
def test_wrong_tensors_are_refused_even_with_a_right_checksum(tmp_path, tensors, found):
    path = vector().save(tmp_path / "v.safetensors")
    with pytest.raises(TrimtabError, match=found):
        load_steering(rewritten(path, header_of(path), tensors))


def test_a_header_in_another_spelling_is_refused(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    tensors = {f"direction.{k}": c for k, c in vector().directions.items()}
    path.write_bytes(save(tensors, metadata={"trimtab": json.dumps(header_of(path), indent=1)}))
    with pytest.raises(TrimtabError, match="canonical"):
        load_steering(path)


def test_deep_nesting_is_refused_not_a_crash(tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(save({}, metadata={"trimtab": "[" * 200_000 + "]" * 200_000}))
    with pytest.raises(TrimtabError, match="plain JSON"):
        load_steering(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    cases = {
        "absent.safetensors": None,
        "text.safetensors": b"not a tensor file",
        "empty.safetensors": b"",
        "plain.safetensors": save({"a": torch.ones(2)}),
        "more.safetensors": save({}, metadata={"trimtab": "{}", "format": "pt"}),
        "list.safetensors": save({}, metadata={"trimtab": "[]"}),
    }
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TrimtabError, match=name):
            load_steering(path)
    with pytest.raises(TrimtabError, match="no such file"):
        load_steering(tmp_path)


def test_describe_is_plain_and_complete(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    said = describe(path)
    assert json.loads(json.dumps(said))["method"] == "mean_difference"
    assert said["alphas"] == {layer: -1.5 * (0.1 * (layer + 1) / 3) for layer in (1, 2)}
    assert said["scope"] == "[0,5)" and said["layers"] == [1, 2] and said["d_model"] == 8
    prompt = describe(PromptSteering("Be brief.").save(tmp_path / "p.safetensors"))
    assert prompt["text"] == "Be brief." and prompt["kind"] == "prompt"


def test_a_low_rank_update_returns_exactly_and_wrong_tensors_are_refused(tmp_path):
    left, right = torch.randn(4, 2), torch.randn(2, 3)
    given = WeightSteering({("mlp", 1): left}, {("mlp", 1): right}, 0.7, "LoRA", {"a": 1}, "f", "m")
    shared = WeightSteering({("mlp", n): left for n in (1, 2)}, {("mlp", n): right for n in (1, 2)})
    assert describe(shared.save(tmp_path / "s.safetensors"))["writers"] == "mlp 1, mlp 2"
    path = given.save(tmp_path / "w.safetensors")
    found = load_steering(path)
    assert isinstance(found, WeightSteering)
    assert torch.equal(found.left["mlp", 1], left) and torch.equal(found.right["mlp", 1], right)
    facts = [(w.label, w.provenance, w.fingerprint, w.model_name) for w in (given, found)]
    assert facts[0] == facts[1] == ("LoRA m=+0.7", {"a": 1}, "f", "m")
    said = describe(path)
    assert (said["kind"], said["writers"], said["rank"]) == ("weights", "mlp 1", 2)
    header = header_of(path)
    for tensors in (
        {"left.mlp.1": left},
        {"left.mlp.1": left, "right.mlp.01": right},
        {"left.mlp.1": left, "right.moe.1": right},
        {"left.mlp.1": left, "right.mlp.1": right, "up.mlp.1": right.clone()},
        {"left.mlp.1": left, "right.mlp.1": right[:1]},
        {"left.mlp.1": left, "right.mlp.1": right / 0},
    ):
        rewritten(path, header, tensors)
        with pytest.raises(TrimtabError, match="w.safetensors"):
            load_steering(path)
