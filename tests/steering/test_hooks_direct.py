"""Steering while the user calls the model, without saying where the prompt ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.steering.hooks import Edit, steered
from trimtab.steering.scope import Scope

PROMPTS = ["the cats sleep", "How do I borrow the ledger?", "no"]
GENERATED = Scope.parse("generated")


def direction(lm: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)


def prepared(lm: LanguageModel) -> dict[str, Tensor]:
    """Left-padded inputs for a direct call of the model, rows in the order of PROMPTS."""
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    order = batch.rows.argsort()
    return {"input_ids": batch.input_ids[order], "attention_mask": batch.attention_mask[order]}


def hf_generate(lm: LanguageModel, **options: object) -> Tensor:
    """The library's own generation, called by the user."""
    return cast("Callable[..., Tensor]", lm.model.generate)(**options)


DIRECT = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("scope", ["all", "last", "prompt", "generated", "[2,20)"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_direct_generation(lm: LanguageModel, scope: str, use_cache: bool):
    edit = Edit(Site("resid_post", 1), "add", direction(lm), 4.0, scope=Scope.parse(scope))
    inputs = prepared(lm)
    with steered(lm, [edit]):
        want = lm.generate(PROMPTS, max_new_tokens=6)
        for _ in range(2):  # a second prompt in the same context starts again
            tokens = hf_generate(lm, **inputs, **DIRECT, use_cache=use_cache)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            assert lm.tokenizer.batch_decode(new, skip_special_tokens=True) == want


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("scope", ["all", "last", "generated", "[2,20)"])
def test_a_static_cache_with_prepared_masks(architecture: str, scope: str):
    lm = tiny.language_model(architecture)
    edit = Edit(Site("resid_post", 1), "add", direction(lm), 4.0, scope=Scope.parse(scope))
    inputs = prepared(lm)
    with steered(lm, [edit]):
        want = hf_generate(lm, **inputs, **DIRECT)
        got = hf_generate(
            lm, **inputs, **DIRECT, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(got, want)


def test_padding_behind_a_prepared_mask_is_not_steered(llama: LanguageModel):
    """The 4-D mask of a static cache does not say which tokens are padding; the positions do."""
    inputs = prepared(llama)
    seen: list[Tensor] = []
    block = llama.sites.blocks[1]

    def see(module: object, args: object, output: Tensor) -> None:
        seen.append(output)

    handles = [block.register_forward_hook(see)]
    with steered(llama, [Edit(Site("resid_post", 1), "add", direction(llama), 4.0)]):
        handles.append(block.register_forward_hook(see))
        hf_generate(llama, **inputs, **DIRECT, cache_implementation="static", disable_compile=True)
    for handle in handles:
        handle.remove()
    touched = [(after != before).any(-1) for before, after in zip(*[iter(seen)] * 2, strict=True)]
    assert torch.equal(touched[0], inputs["attention_mask"].bool())
    assert len(touched) > 2 and all(bool(call.all()) for call in touched[1:])


def test_beams_keep_the_boundaries(llama: LanguageModel):
    edit = Edit(Site("resid_post", 1), "add", direction(llama), 4.0, scope=GENERATED)
    (batch,) = llama.batches([llama.encode(prompt) for prompt in PROMPTS])
    beams = {**DIRECT, "num_beams": 3}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with steered(llama, [edit]):
        with llama.calling(batch):
            told = hf_generate(llama, **inputs, **beams)
        assert torch.equal(hf_generate(llama, **inputs, **beams), told)
    assert not torch.equal(hf_generate(llama, **inputs, **beams), told)


def test_a_call_with_other_rows_is_refused(llama: LanguageModel):
    (batch,) = llama.batches([llama.encode(prompt) for prompt in PROMPTS])
    edit = Edit(Site("resid_post", 1), "add", direction(llama), 4.0, scope=GENERATED)
    with steered(llama, [edit]), llama.calling(batch):
        for _ in range(2):  # a refusal leaves no half-made state behind
            with pytest.raises(TrimtabError, match="rows"):
                llama.model(batch.input_ids[:2])


def test_direct_calls_without_a_boundary(llama: LanguageModel):
    ids = torch.tensor([llama.encode("the cats").ids])
    with torch.no_grad():
        cache = llama.model(ids, use_cache=True).past_key_values
    for scope, refused in [("all", False), ("[0,99)", False), ("last", True), ("prompt", True)]:
        edit = Edit(Site("resid_post", 1), "add", direction(llama), 4.0, scope=Scope.parse(scope))
        with steered(llama, [edit]):
            if refused:
                with pytest.raises(TrimtabError, match=r"lm\.calling"):
                    llama.model(ids[:, -1:], past_key_values=cache)
            else:
                llama.model(ids[:, -1:], past_key_values=cache)
    edit = replace(edit, scope=Scope.parse("post_instruction"))
    with steered(llama, [edit]):
        with pytest.raises(TrimtabError, match="last"):
            llama.model(ids)


def test_post_instruction_needs_a_template(plain: LanguageModel):
    edit = Edit(Site("resid_post", 1), "add", direction(plain), 4.0)
    with steered(plain, [replace(edit, scope=Scope.parse("post_instruction"))]):
        with pytest.raises(TrimtabError, match="last"):
            plain.generate("the cats")


def test_calling_restores_after_an_exception(llama: LanguageModel):
    (outer,) = llama.batches([llama.encode("the cats")])
    (inner,) = llama.batches([llama.encode("the ferry")])
    with llama.calling(outer):
        with pytest.raises(ZeroDivisionError):
            with llama.calling(inner):
                assert llama.active_batch is inner
                raise ZeroDivisionError
        assert llama.active_batch is outer
    assert llama.active_batch is None


def test_embeddings_as_inputs(llama: LanguageModel):
    ids = torch.tensor([llama.encode("the cats").ids])
    embedded = llama.sites.embedding(ids)
    with torch.no_grad():
        for scope in ("all", "last", "[1,3)"):
            site = Site("resid_post", 1)
            edit = Edit(site, "add", direction(llama), 4.0, scope=Scope.parse(scope))
            with steered(llama, [edit]):
                want = llama.model(input_ids=ids).logits
                assert torch.equal(llama.model(inputs_embeds=embedded).logits, want)
