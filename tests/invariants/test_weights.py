"""The laws for the weights lever: identity, undoing, batches and caches, adapter, checkpoint, model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from planted import low_rank
from trimtab.errors import TrimtabError
from trimtab.export import write_peft
from trimtab.models.model import LanguageModel
from trimtab.steering.load import load_steering
from trimtab.steering.nulls import random_null
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.weights import bake

PROMPTS = ["no", "How do I borrow the ledger? The cats sleep.", "the ferry leaves the pier"]
PARTLY = ("mixtral",)  # experts have no single MLP writer, so only the attention's is updated


def logits(lm: LanguageModel) -> torch.Tensor:
    """Every real token's logits, one prompt at a time."""
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([lm.encode(p).ids])).logits[0] for p in PROMPTS])


def test_strength_0_is_the_identity_and_leaving_restores(lm: LanguageModel) -> None:
    before, text = logits(lm), lm.generate(PROMPTS, max_new_tokens=5)
    lever = low_rank(lm)
    with lever.at(0.0).on(lm):
        assert torch.equal(logits(lm), before)
        assert lm.generate(PROMPTS, max_new_tokens=5) == text
    with pytest.raises(ZeroDivisionError), lever.on(lm):
        assert (logits(lm) - before).abs().max() > 0.05
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert torch.equal(logits(lm), before)
    assert lm.generate(PROMPTS, max_new_tokens=5) == text


def test_rows_batches_and_caches_agree(lm: LanguageModel) -> None:
    with low_rank(lm).on(lm):
        together = lm.generate(PROMPTS, max_new_tokens=8)
        assert lm.generate(PROMPTS, max_new_tokens=8, use_cache=False) == together
        assert [lm.generate(prompt, max_new_tokens=8) for prompt in PROMPTS] == together
        size = max(1.0, float(logits(lm).abs().max()))
        alone = torch.cat([lm.next_logits([prompt]) for prompt in PROMPTS])
        assert (lm.next_logits(PROMPTS) - alone).abs().max() < 1e-5 * size


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_hook_adapter_and_checkpoint_are_one(tmp_path: Path, name: str) -> None:
    lm = tiny.language_model(name)
    file = low_rank(lm, m=0.7).save(tmp_path / "lever.safetensors")
    lever, plain = load_steering(file), logits(lm)
    assert isinstance(lever, WeightSteering)
    assert ("mlp" in lever.site) == (name not in PARTLY)
    with low_rank(lm, m=0.7).on(lm):
        made = logits(lm)
    with lever.on(lm):
        assert torch.equal(logits(lm), made)  # the file keeps every bit
        hooked, text = logits(lm), lm.generate(PROMPTS, max_new_tokens=8)
    assert (hooked - plain).abs().max() > 0.05
    allowed = 1e-5 * max(1.0, float(hooked.abs().max()))

    report = lever.bake(tmp_path / "baked", lm)
    assert report.equal_text and report.route == "rank-2 update of the writers"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    baked = LanguageModel(model, AutoTokenizer.from_pretrained(tmp_path / "baked"))
    assert (logits(baked) - hooked).abs().max() < allowed
    assert baked.generate(PROMPTS, max_new_tokens=8) == text
    assert "low rank, attention 0" in (tmp_path / "baked" / "README.md").read_text()

    write_peft(lm, lever, tmp_path / "adapter")
    base = copy.deepcopy(lm.model)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (logits(LanguageModel(base, lm.tokenizer)) - hooked).abs().max() < allowed
    with adapted.disable_adapter():
        assert torch.equal(logits(LanguageModel(base, lm.tokenizer)), plain)
    assert torch.equal(logits(lm), plain)


def both(lm: LanguageModel, *levers: Any) -> torch.Tensor:
    """Logits under all of them."""
    if not levers:
        return logits(lm)
    with levers[0].on(lm):
        return both(lm, *levers[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite"])
def test_beside_a_vector_and_a_projection_of_the_same_writer(tmp_path: Path, name: str) -> None:
    """What the update writes is projected too, whichever was switched on first."""
    lm = tiny.language_model(name)
    c = {2: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(4))}
    levers = [
        low_rank(lm),
        VectorSteering.from_directions(lm, c, 0.8, site="attn_out", operation="ablate"),
        VectorSteering.from_directions(lm, c, 0.8),
        low_rank(lm, layers=(2,), m=-0.5),
    ]
    hooked = both(lm, *levers)
    report = bake(lm, levers, tmp_path / "baked")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    found = logits(LanguageModel(loaded, lm.tokenizer))
    assert (found - hooked).abs().max() < 1e-5 * max(1.0, float(hooked.abs().max()))
    sliced = bake(lm, levers, tmp_path / "sliced", verify="slice")
    assert sliced.max_logit_difference is not None and "slice" in sliced.verified


def test_a_null_pushes_as_hard_another_way(llama: LanguageModel) -> None:
    lever = low_rank(llama)
    null, again, other = (random_null(lever, seed) for seed in (3, 3, 4))
    for writer, b in lever.left.items():
        assert torch.allclose(null.left[writer].norm(dim=0), b.norm(dim=0))
        cosine = torch.nn.functional.cosine_similarity(null.left[writer], b, dim=0)
        assert cosine.abs().max() < 0.7
        assert torch.equal(null.right[writer], lever.right[writer])
        assert torch.equal(null.left[writer], again.left[writer])
        assert not torch.equal(null.left[writer], other.left[writer])


def test_another_model_is_refused(tmp_path: Path) -> None:
    lm, other = tiny.language_model("llama"), tiny.language_model("llama", seed=1)
    with pytest.raises(TrimtabError, match="another model"), low_rank(lm).on(other):
        pass
    with pytest.raises(TrimtabError, match="another model"):
        bake(other, low_rank(lm), tmp_path / "baked")
    with pytest.raises(TrimtabError, match="another model"):
        write_peft(other, low_rank(lm), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
