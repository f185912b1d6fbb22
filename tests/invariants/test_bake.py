"""Law 2: hook == baked checkpoint after a real save and reload; what cannot be exact is refused."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake

PROMPTS = [
    "The ferry leaves the harbor at noon.",
    "How do I borrow the ledger?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Cats?"}],
]


def direction(seed: int, width: int = tiny.WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def steering(lm: LanguageModel, layers=(1, 3), alpha=0.8, **how) -> VectorSteering:
    return VectorSteering.from_directions(
        lm, {layer: direction(layer) for layer in layers}, alpha, **how
    )


def logits(lm: LanguageModel) -> torch.Tensor:
    """Every real token's logits, one prompt at a time so that nothing depends on batching."""
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([lm.encode(p).ids])).logits[0] for p in PROMPTS])


@pytest.mark.parametrize("layers", [(0,), (2,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("m", [1.0, -2.0])
def test_hook_equals_checkpoint(tmp_path, layers, m):
    lm = tiny.language_model("llama")
    vector = steering(lm, layers).at(m)
    plain = logits(lm)
    with vector.on(lm):
        hooked, text = logits(lm), lm.generate(PROMPTS)
    report = vector.bake(tmp_path / "baked", lm)

    # Stock transformers, nothing of this library: the checkpoint must steer by itself.
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baked")
    baked = LanguageModel(model, tokenizer)
    assert (logits(baked) - hooked).abs().max() < 1e-5
    assert (hooked - plain).abs().max() > 0.1  # there was something to lose
    assert baked.generate(PROMPTS) == text
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5
    assert report.equal_text is True and (report.steering_effect or 0) > 0.1
    assert (report.route, report.unexpected_keys, report.missing_keys) == ("bias", (), ())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_and_load_by_folder(tmp_path, tied):
    config = tiny.config("llama")
    config.tie_word_embeddings = tied
    lm = tiny.language_model(config)
    vector = steering(lm)
    with vector.on(lm):
        hooked, text = logits(lm), lm.generate(PROMPTS)
    vector.bake(tmp_path / "baked", lm)
    baked = load(str(tmp_path / "baked"))
    assert (logits(baked) - hooked).abs().max() < 1e-5
    assert baked.generate(PROMPTS) == text
    shared = baked.sites.embedding.weight is baked.sites.unembedding.weight
    assert shared == tied


def test_a_bias_already_there_is_added_to(tmp_path):
    config = tiny.config("llama")
    config.mlp_bias = True
    lm = tiny.language_model(config)
    before = lm.model.state_dict()["model.layers.1.mlp.down_proj.bias"].clone()
    assert before.abs().max() > 0.01
    vector = steering(lm, (1,))
    with vector.on(lm):
        hooked = logits(lm)
    vector.bake(tmp_path / "once", lm)
    once = load(str(tmp_path / "once"))
    assert (logits(once) - hooked).abs().max() < 1e-5

    # Baked checkpoints have biases: baking the next vector into one must add up.
    second = steering(once, (1, 2), alpha=-0.5)
    with second.on(once):
        hooked_twice = logits(once)
    second.bake(tmp_path / "twice", once)
    twice = load(str(tmp_path / "twice"))
    assert (logits(twice) - hooked_twice).abs().max() < 1e-5
    bias = twice.model.state_dict()["model.layers.1.mlp.down_proj.bias"]
    assert torch.allclose(bias, before + 0.8 * direction(1) - 0.5 * direction(1), atol=1e-6)


def test_bfloat16_stores_the_rounded_bias_and_says_so(tmp_path):
    source = tiny.language_model("llama", dtype=torch.bfloat16)
    source.model.save_pretrained(tmp_path / "base")
    source.tokenizer.save_pretrained(tmp_path / "base")
    lm = load(str(tmp_path / "base"), dtype="bfloat16")
    vector = steering(lm)
    report = vector.bake(tmp_path / "baked", lm)
    baked = load(str(tmp_path / "baked"))
    assert baked.model.dtype == torch.bfloat16 and report.dtype == "bfloat16"
    stored = baked.model.state_dict()["model.layers.3.mlp.down_proj.bias"]
    assert torch.equal(stored, (0.8 * direction(3).double()).to(torch.bfloat16))
    assert 0 < report.rounding < 2**-8
    assert report.max_logit_difference is not None and report.steering_effect is not None
    assert report.max_logit_difference < report.steering_effect / 3


def test_the_live_model_is_left_untouched(tmp_path):
    lm = tiny.language_model("llama")
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    pointers = [p.data_ptr() for p in lm.model.parameters()]
    config, fingerprint, text = lm.model.config.to_dict(), lm.fingerprint, lm.generate(PROMPTS)
    steering(lm).bake(tmp_path / "baked", lm)
    assert lm.model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert [p.data_ptr() for p in lm.model.parameters()] == pointers
    assert lm.model.config.to_dict() == config and lm.fingerprint == fingerprint
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert lm.generate(PROMPTS) == text


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_several_vectors_at_several_sites_compose(tmp_path, name):
    lm = tiny.language_model(name)
    vectors = [
        steering(lm, (0, 1, 3)),
        steering(lm, (1,), -0.5, site="attn_out"),
        steering(lm, (2,), 0.7, site="resid_pre"),
        steering(lm, (0,), 0.3, site="embed"),
    ]
    plain = logits(lm)
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(lm))
        hooked, text = logits(lm), lm.generate(PROMPTS)
    bake(lm, vectors, tmp_path / "baked")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    baked = LanguageModel(model, AutoTokenizer.from_pretrained(tmp_path / "baked"))
    assert (logits(baked) - hooked).abs().max() < 1e-5
    assert (hooked - plain).abs().max() > 0.1
    assert baked.generate(PROMPTS) == text


@pytest.mark.parametrize(
    "how",
    [{"scope": scope} for scope in ("last", "prompt", "generated", "post_instruction", "[0,5)")]
    + [{"operation": operation} for operation in ("ablate", "affine")],
)
def test_what_weights_cannot_express_is_refused_by_name(tmp_path, how):
    lm = tiny.language_model("llama")
    with pytest.raises(TrimtabError) as caught:
        bake(lm, steering(lm, **how), tmp_path / "baked")
    ((kind, value),) = how.items()
    assert "architecture LlamaForCausalLM" in caught.value.asked
    assert f"{kind} {value}" in caught.value.asked
    assert "no exact route" in caught.value.found and "hook" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_that_computes_otherwise_is_refused(tmp_path):
    lm = tiny.language_model("llama")

    class Changed(type(lm.model)):
        pass

    lm.model.__class__ = Changed
    with pytest.raises(TrimtabError, match="architecture Changed"):
        bake(lm, steering(lm), tmp_path / "baked")


def test_another_models_vector_is_refused(tmp_path):
    lm, other = tiny.language_model("llama"), tiny.language_model("llama", seed=1)
    with pytest.raises(TrimtabError, match="fingerprint"):
        bake(lm, steering(other), tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []
