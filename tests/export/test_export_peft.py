"""Adapters against the hook, through PEFT itself."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.export import write_peft
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import at_every_writer

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]
POST_NORM = ("gemma2", "gemma3", "olmo2")
WITHOUT_MLP_WRITER = ("mixtral",)
BIASED = ("gpt2", "gpt_neox")
PLAIN = tuple(n for n in tiny.ARCHITECTURES if n not in (*POST_NORM, *WITHOUT_MLP_WRITER))
WITH_MIDDLE = tuple(n for n in tiny.ARCHITECTURES if n not in (*POST_NORM, *tiny.PARALLEL))


def direction(seed: int) -> torch.Tensor:
    c = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return c / c.norm()


def steering(lm: LanguageModel, site: str, layers, seed: int = 1, m: float = 2.0, **how):
    each = {layer: direction(seed + layer) for layer in layers}
    return VectorSteering.from_directions(lm, each, m, site=site, **how)


def logits(lm: LanguageModel) -> torch.Tensor:
    """Logits of every real position of the prompts, end to end."""
    encoded = [lm.encode(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        rows = [lm.model(torch.tensor([e.ids])).logits[0].float() for e in encoded]
    return torch.cat(rows)


def difference(lm: LanguageModel, vectors, folder: Path) -> float:
    """Largest difference in logits between the hook and a fresh model with the adapter."""
    before = logits(lm)
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(lm))
        hooked = logits(lm)
    assert (hooked - before).abs().max() > 0.01
    write_peft(lm, vectors, folder)
    base = copy.deepcopy(lm.model)
    adapted = PeftModel.from_pretrained(base, str(folder))
    found = logits(LanguageModel(base, lm.tokenizer))
    with adapted.disable_adapter():
        assert torch.equal(logits(LanguageModel(base, lm.tokenizer)), before)
    assert torch.equal(logits(lm), before)
    return float((found - hooked).abs().max())


@pytest.mark.parametrize("name", PLAIN)
def test_a_vector_is_the_hook(tmp_path, name):
    lm = tiny.language_model(name)
    vectors = [steering(lm, "resid_post", (0, 2, 3)), steering(lm, "mlp_out", (1, 2), seed=7)]
    assert difference(lm, vectors, tmp_path / "adapter") < 2e-5


@pytest.mark.parametrize("name", WITH_MIDDLE)
def test_the_middle_of_a_block(tmp_path, name):
    lm = tiny.language_model(name)
    vectors = [steering(lm, "resid_mid", (1,)), steering(lm, "attn_out", (1, 3), seed=5)]
    assert difference(lm, vectors, tmp_path / "adapter") < 2e-5


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_constant_of_the_embedding(tmp_path, name):
    lm = tiny.language_model(name)
    assert difference(lm, [steering(lm, "embed", (0,))], tmp_path / "adapter") < 5e-5


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("operation", ["ablate", "affine"])
def test_a_projection_of_the_embedding(tmp_path, name, operation):
    lm = tiny.language_model(name)
    vector = steering(lm, "embed", (0,), m=0.7, operation=operation, targets={0: 1.5})
    assert difference(lm, [vector], tmp_path / "adapter") < 5e-5


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("operation", ["ablate", "affine"])
def test_projections_of_the_writers(tmp_path, name, operation):
    lm = tiny.language_model(name)
    how = {"operation": operation, "targets": {1: 0.8, 2: -0.6}}
    vectors = [
        steering(lm, "attn_out", (1, 2), m=0.6, **how),
        steering(lm, "mlp_out", (2,), m=1.0, **how),
    ]
    assert difference(lm, vectors, tmp_path / "adapter") < 2e-5


@pytest.mark.parametrize("name", PLAIN)
def test_several_of_one_module_follow_each_other(tmp_path, name):
    """What enters block 2, two projections of one writer, and a constant between them."""
    lm = tiny.language_model(name)
    vectors = [
        steering(lm, "attn_out", (1,), m=0.6, operation="ablate"),
        steering(lm, "attn_out", (1,), seed=8),
        steering(lm, "attn_out", (1,), seed=5, m=0.9, operation="affine", targets={1: 0.7}),
        steering(lm, "resid_pre", (2,), seed=3),
    ]
    assert difference(lm, vectors, tmp_path / "adapter") < 2e-5


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in BIASED])
def test_ablation_at_every_writer_empties_the_stream(tmp_path, name):
    """The rank-1 LoRA equals a projection at every point of the stream."""
    lm = tiny.language_model(name)
    vector = steering(lm, "resid_post", (2,), m=1.0, operation="ablate")
    parts = at_every_writer(vector)
    assert difference(lm, parts, tmp_path / "adapter") < 2e-5
    base = copy.deepcopy(lm.model)
    PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    seen: list[torch.Tensor] = []
    adapted = LanguageModel(base, lm.tokenizer)
    for block in adapted.sites.blocks:
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    logits(adapted)
    assert len(seen) == 2 * tiny.LAYERS
    assert max(float((h @ vector.directions[2]).abs().max()) for h in seen) < 1e-4


@pytest.mark.parametrize("name", BIASED)
def test_biases_and_an_embedding_do_not_go_together(tmp_path, name):
    lm = tiny.language_model(name)
    vector = steering(lm, "resid_post", (2,), m=1.0, operation="ablate")
    with pytest.raises(TrimtabError, match="no biases in an adapter with an embedding"):
        write_peft(lm, at_every_writer(vector), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_post_norm_blocks_are_refused(tmp_path, name, site):
    lm = tiny.language_model(name)
    with pytest.raises(TrimtabError, match="norm between"):
        write_peft(lm, steering(lm, site, (1,)), tmp_path / "adapter")


def test_experts_are_refused(tmp_path):
    lm = tiny.language_model("mixtral")
    with pytest.raises(TrimtabError, match="mlp writer of layer 1 of Mixtral.*\n.*mixture of experts"):
        write_peft(lm, steering(lm, "resid_post", (1,)), tmp_path / "adapter")


def test_what_an_adapter_cannot_hold_is_refused(tmp_path, llama):
    made = steering(llama, "resid_post", (1,))
    cases = {
        "every token alike": made.select(scope="last"),
        "strength 0": made.at(0.0),
        "at_every_writer": made.select(operation="ablate"),
        "no steering": [],
        "instead of": steering(tiny.language_model("llama", seed=3), "resid_post", (1,)),
    }
    for found, vector in cases.items():
        with pytest.raises(TrimtabError, match=found):
            write_peft(llama, vector, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_whole_deterministic_and_never_overwritten(tmp_path, llama):
    made = steering(llama, "resid_post", (1, 2))
    write_peft(llama, made, tmp_path / "a")
    write_peft(llama, made, tmp_path / "b")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stored = load_file(tmp_path / "a" / names[2])
    bias = stored["base_model.model.model.layers.2.mlp.down_proj.lora_B.bias"]
    assert torch.allclose(bias, 2.0 * direction(3))
    assert "cannot merge" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(TrimtabError, match="something there already"):
        write_peft(llama, made, tmp_path / "a")
