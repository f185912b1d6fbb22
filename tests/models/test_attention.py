"""Attention seen and changed from outside: exact, undone exactly, and what the library computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.attention import NAME, AttentionCall, attending
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config

PROMPTS = ["Hello there", "The ferry leaves the harbor at noon and the cats sleep on the pier."]


def batch_of(lm: LanguageModel):
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    return batch


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    """Of the tokens that are no padding, `[tokens, vocab]`."""
    batch = batch_of(lm)
    return lm.forward(batch)[batch.attention_mask.bool()]


def nothing(call: AttentionCall) -> None:
    return None


def first_head_twice(call: AttentionCall) -> Tensor:
    mixed = call.mix(call.probabilities()).clone()
    mixed[:, :, 0] *= 2  # not all heads: a norm behind the attention would undo it
    return mixed


def test_watching_changes_nothing(lm: LanguageModel) -> None:
    before, seen = logits(lm), list[AttentionCall]()
    with attending(lm, seen.append):
        torch.testing.assert_close(logits(lm), before, rtol=1e-5, atol=1e-5)
    assert [call.layer for call in seen] == list(range(lm.n_layers))
    for call in seen:
        batch, heads, queries, width = call.query.shape
        assert (batch, queries) == batch_of(lm).input_ids.shape
        assert call.key.shape == call.value.shape and heads % call.key.shape[1] == 0
        assert call.mix(call.probabilities()).shape == (batch, queries, heads, width)
    assert torch.equal(logits(lm), before)


def test_what_is_returned_is_used_and_undone(lm: LanguageModel) -> None:
    before, name = logits(lm), text_config(lm.model)._attn_implementation
    with attending(lm, first_head_twice):
        assert text_config(lm.model)._attn_implementation == NAME
        assert float((logits(lm) - before).abs().max()) > 1e-2
    assert text_config(lm.model)._attn_implementation == name
    assert torch.equal(logits(lm), before)


def test_an_exception_leaves_the_model_as_it_was(lm: LanguageModel) -> None:
    before = logits(lm)

    def fail(call: AttentionCall) -> None:
        if call.layer == 2:
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"), attending(lm, fail):
        logits(lm)
    assert torch.equal(logits(lm), before)


def test_the_inner_handler_is_asked_and_the_outer_one_afterwards(llama: LanguageModel) -> None:
    before = logits(llama)
    with attending(llama, first_head_twice):
        outer = logits(llama)
        with attending(llama, nothing):
            torch.testing.assert_close(logits(llama), before, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(llama), outer)
    assert not torch.equal(outer, before) and torch.equal(logits(llama), before)


def test_generation_with_a_cache_is_the_same(lm: LanguageModel) -> None:
    wanted, lengths = lm.generate(PROMPTS, max_new_tokens=12), set[int]()

    def watch(call: AttentionCall) -> None:
        lengths.add(call.query.shape[2])

    with attending(lm, watch):
        assert lm.generate(PROMPTS, max_new_tokens=12) == wanted
        assert lm.generate(PROMPTS, max_new_tokens=12, use_cache=False) == wanted
    assert 1 in lengths and len(lengths) > 2


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_probabilities_are_those_of_the_library(architecture: str) -> None:
    lm = tiny.language_model(architecture)
    seen: list[Tensor] = []

    def keep(call: AttentionCall) -> None:
        seen.append(call.probabilities())

    with torch.no_grad(), attending(lm, keep):
        lm.forward(batch_of(lm))
    lm.model.set_attn_implementation("eager")
    batch = batch_of(lm)
    with torch.no_grad():
        wanted = lm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0),
            output_attentions=True,
        ).attentions
    rows = batch.attention_mask.bool()
    for mine, theirs in zip(seen, wanted, strict=True):
        mine, theirs = (x.transpose(1, 2)[rows] for x in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine.sum(-1)))


def test_gradients_flow_through_a_handler(lm: LanguageModel) -> None:
    scale = torch.ones(lm.n_layers, requires_grad=True)

    def total(scale: Tensor) -> Tensor:
        def handler(call: AttentionCall) -> Tensor:
            weights = torch.ones(call.query.shape[1])
            weights = torch.cat([scale[call.layer : call.layer + 1], weights[1:]])
            return call.mix(call.probabilities()) * weights[:, None]

        with attending(lm, handler):
            return lm.forward(batch_of(lm))[:, -1, 0].double().sum()

    (slopes,) = torch.autograd.grad(total(scale), scale)
    step = 1e-2 * slopes.sign()
    with torch.no_grad():
        numeric = float(total(scale + step) - total(scale - step)) / 2e-2
    assert float(slopes.abs().min()) > 0
    assert float(slopes.abs().sum()) == pytest.approx(numeric, rel=2e-2, abs=2e-3)


def test_dropout_is_refused() -> None:
    settings = tiny.config("llama")
    settings.attention_dropout = 0.5
    lm = tiny.language_model(settings)
    lm.model.train()
    with pytest.raises(TrimtabError, match="dropout"), attending(lm, nothing):
        lm.forward(batch_of(lm))
    lm.model.eval()
    with attending(lm, nothing):
        lm.forward(batch_of(lm))


def test_attention_sinks_are_refused(llama: LanguageModel) -> None:
    from transformers import AttentionInterface

    states = torch.zeros(1, 4, 2, 8)
    module = llama.sites.attention[0]
    with attending(llama, nothing), pytest.raises(TrimtabError, match="attention sinks"):
        AttentionInterface()[NAME](module, states, states, states, None, s_aux=torch.zeros(4))
