"""Control vectors: what is written, what is read back, what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.export import read_gguf, write_gguf
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering


def steering(lm: LanguageModel, layers=(1, 3), alpha: float = 3.0, **how) -> VectorSteering:
    generator = torch.Generator().manual_seed(0)
    each = {layer: torch.randn(tiny.WIDTH, generator=generator) for layer in layers}
    return VectorSteering.from_directions(lm, each, alpha, **how)


def other_file(path: Path, tensors: dict[str, np.ndarray], architecture="controlvector") -> Path:
    """A file as another program writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_is_what_llama_cpp_reads(tmp_path, llama):
    vector = steering(llama).at(-0.5)
    path = write_gguf(vector, tmp_path / "v.gguf", "llama")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    own = {name for name in reader.fields if name.startswith("trimtab.")}
    assert own == {f"trimtab.{name}" for name in ("n_layers", "model", "fingerprint", "label")}
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.3"]
    for tensor in reader.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        meant = vector.alphas[layer] * vector.directions[layer]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.allclose(tensor.data, meant.numpy(), atol=1e-6) and vector.alphas[layer] < 0
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]
    assert write_gguf(vector, tmp_path / "w.gguf", "llama").read_bytes() == path.read_bytes()


def test_a_vector_comes_back(tmp_path, llama):
    vector = steering(llama).at(1.5)
    path = write_gguf(vector, tmp_path / "v.gguf")
    for lm in (None, llama):
        back = read_gguf(path, lm)
        assert back.strength == 1.0 and back.layers == (1, 3) and back.site == "resid_post"
        assert back.fingerprint == llama.fingerprint and back.n_layers == llama.n_layers
        for layer in back.layers:
            meant = vector.alphas[layer] * vector.directions[layer]
            found = back.alphas[layer] * back.directions[layer]
            assert torch.allclose(found, meant, atol=1e-5)
        with vector.on(llama):
            hooked = llama.next_logits(["Cats?"])
        with back.on(llama):
            assert torch.allclose(llama.next_logits(["Cats?"]), hooked, atol=1e-4)
        assert (hooked - llama.next_logits(["Cats?"])).abs().max() > 0.1


def test_files_of_other_programs(tmp_path, llama):
    rows = {f"direction.{n}": np.full(tiny.WIDTH, n, np.float32) for n in (1, 2)}
    rows["direction.3"] = np.zeros(tiny.WIDTH, np.float32)
    path = other_file(tmp_path / "other.gguf", rows)
    back = read_gguf(path, llama)
    assert back.layers == (1, 2)
    assert back.alphas[2] == pytest.approx(2 * tiny.WIDTH**0.5)
    with pytest.raises(TrimtabError, match="does not say how deep"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("found", "change"),
    [
        ("layer 0", {}),
        ("operation ablate", {"operation": "ablate"}),
        ("site resid_mid", {"site": "resid_mid"}),
        ("scope last", {"scope": "last"}),
        ("strength 0", {"strength": 0.0}),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, llama, found, change):
    layers = (0, 1) if not change else (1, 2)
    with pytest.raises(TrimtabError, match=found):
        write_gguf(steering(llama, layers).select(**change), tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "tensors"),
    [
        ("direction.0", {"direction.0": np.ones(tiny.WIDTH, np.float32)}),
        ("blk.1.weight", {"blk.1.weight": np.ones(tiny.WIDTH, np.float32)}),
        ("F16", {"direction.1": np.ones(tiny.WIDTH, np.float16)}),
        ("one F32 vector", {"direction.1": np.ones((2, tiny.WIDTH), np.float32)}),
        ("not finite", {"direction.1": np.full(tiny.WIDTH, np.nan, np.float32)}),
        ("nothing but zeros", {"direction.1": np.zeros(tiny.WIDTH, np.float32)}),
        ("instead of the model's 32", {"direction.1": np.ones(8, np.float32)}),
        ("layers 0 to 3", {"direction.4": np.ones(tiny.WIDTH, np.float32)}),
        ("no direction.N", {}),
    ],
)
def test_files_with_a_defect_are_refused(tmp_path, llama, found, tensors):
    path = other_file(tmp_path / "bad.gguf", tensors)
    with pytest.raises(TrimtabError, match=found):
        read_gguf(path, llama)


def test_what_is_no_control_vector_is_refused(tmp_path, llama):
    model = other_file(tmp_path / "m.gguf", {"direction.1": np.ones(32, np.float32)}, "llama")
    (tmp_path / "text.gguf").write_text("no such thing")
    whole = write_gguf(steering(llama), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) - 100])
    for path, found in (
        (model, "architecture 'llama'"),
        (tmp_path / "text.gguf", "no readable GGUF"),
        (tmp_path / "half.gguf", "no readable GGUF"),
        (tmp_path / "none.gguf", "no such file"),
    ):
        with pytest.raises(TrimtabError, match=found):
            read_gguf(path, llama)
    other = write_gguf(steering(tiny.language_model("llama", seed=5)), tmp_path / "other.gguf")
    assert read_gguf(other).fingerprint != llama.fingerprint
    with pytest.raises(TrimtabError, match="fingerprint"):
        read_gguf(other, llama)
