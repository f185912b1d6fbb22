"""The prompt lever: text and soft tokens in every slot, for one prompt, a batch, and generation."""

from __future__ import annotations

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.steering.load import describe, load_steering
from trimtab.steering.prompt import PromptSteering, prompt

PROMPTS = ["How do I borrow the ledger?", "The ferry leaves the harbor at noon, is that so?"]
WORDS = {"system": "Talk about cats.", "prefix": "Talk about cats.", "suffix": " Talk about cats."}


def soft_twin(lm, slot: str) -> PromptSteering:
    """The embeddings of a text's own tokens, in the text's place."""
    text = prompt(WORDS[slot], slot)
    with text.on(lm):
        longer = lm.encode(PROMPTS[0]).ids
    plain = lm.encode(PROMPTS[0]).ids
    ids = lm.tokenizer(WORDS[slot], add_special_tokens=False)["input_ids"]
    assert len(longer) >= len(plain) + len(ids)
    return PromptSteering("", slot=slot, vectors=token_embeddings(lm, ids))


def test_a_prompt_lever_is_the_system_text_and_is_restored(lm):
    lever = prompt("Talk only about cats.")
    plain = lm.encode(PROMPTS[0]).ids
    with lever.on(lm):
        assert lm.system == "Talk only about cats."
        steered = lm.encode(PROMPTS[0])
        with prompt("Inner.").on(lm):
            assert "Inner." in lm.encode(PROMPTS[0]).text
        assert lm.system == "Talk only about cats."
    assert "Talk only about cats." in steered.text
    assert lm.system is None and lm.encode(PROMPTS[0]).ids == plain
    with lever.at(0).on(lm):
        assert lm.encode(PROMPTS[0]).ids == plain
    with pytest.raises(ZeroDivisionError), lever.on(lm):
        _ = 1 / 0
    assert lm.system is None


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0, float("nan")])
def test_a_prompt_has_no_half_strength(strength):
    with pytest.raises(TrimtabError, match="0 or 1"):
        prompt("x").at(strength)


@pytest.mark.parametrize("slot", ["prefix", "suffix"])
def test_a_text_stands_in_its_slot(lm, slot):
    lever = prompt(WORDS[slot], slot)
    with lever.on(lm):
        text = lm.encode(PROMPTS[0]).text
    joined = f"Talk about cats. {PROMPTS[0]}" if slot == "prefix" else PROMPTS[0] + WORDS[slot]
    assert joined in text
    conversation = [
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": PROMPTS[0]},
    ]
    if lm.tokenizer.chat_template:
        with lever.on(lm):
            assert joined in lm.encode(conversation).text
            assert lm.encode(conversation).text.count("cats") == 1
    assert lm.inserts == ()


@pytest.mark.parametrize("slot", list(WORDS))
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_soft_tokens_with_the_embeddings_of_a_text_are_the_text(architecture, slot):
    lm = tiny.language_model(architecture)
    text, soft = prompt(WORDS[slot], slot), soft_twin(lm, slot)
    with text.on(lm):
        wanted, answers = lm.next_logits(PROMPTS), lm.generate(PROMPTS, max_new_tokens=6)
    plain = lm.next_logits(PROMPTS)
    for use_cache in (True, False):
        with soft.on(lm):
            assert torch.allclose(lm.next_logits(PROMPTS), wanted, atol=1e-5)
            assert torch.allclose(lm.next_logits(PROMPTS[0]), wanted[:1], atol=1e-5)
            assert lm.generate(PROMPTS, max_new_tokens=6, use_cache=use_cache) == answers
    assert (wanted - plain).abs().max() > 1e-3
    assert torch.equal(lm.next_logits(PROMPTS), plain)
    assert lm.soft_count == 0 and lm.inserts == ()


def test_nested_soft_prompts_and_boundaries(llama):
    first, second = soft_twin(llama, "prefix"), soft_twin(llama, "suffix")
    with first.on(llama), second.on(llama):
        both = llama.encode(PROMPTS[0])
        logits = llama.next_logits(PROMPTS[0])
    with prompt(WORDS["prefix"], "prefix").on(llama), prompt(WORDS["suffix"], "suffix").on(llama):
        texts = llama.encode(PROMPTS[0])
        assert torch.allclose(llama.next_logits(PROMPTS[0]), logits, atol=1e-5)
    assert len(both.ids) == len(texts.ids)
    assert (both.prompt_length, both.instruction_end) == (
        texts.prompt_length,
        texts.instruction_end,
    )
    with pytest.raises(ZeroDivisionError), first.on(llama):
        _ = 1 / 0
    assert llama.inserts == () and llama.soft_count == 0


def test_divergence_sees_a_prefix(llama):
    answers = llama.generate(PROMPTS, max_new_tokens=5)
    by_text = Reference(llama, PROMPTS, answers).kl(prompt(WORDS["prefix"], "prefix"))
    by_soft = Reference(llama, PROMPTS, answers).kl(soft_twin(llama, "prefix"))
    for a, b in zip(by_text, by_soft, strict=True):
        assert a.max() > 1e-4 and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "lever",
    [
        PromptSteering("Be brief.", slot="prefix", separator="\n\n", provenance={"seed": 1}),
        prompt(" Be brief.", "suffix"),
        PromptSteering("", 0.0, slot="suffix", vectors=torch.arange(12.0).reshape(3, 4) / 7),
    ],
    ids=["prefix", "suffix", "soft"],
)
def test_files_hold_every_slot(lever, tmp_path):
    path = lever.save(tmp_path / "p.safetensors")
    loaded = load_steering(path)
    assert loaded == lever and loaded.save(tmp_path / "q").read_bytes() == path.read_bytes()
    assert describe(path)["slot"] == lever.slot


def test_what_cannot_be_a_prompt_is_refused(llama):
    with pytest.raises(TrimtabError, match="slot"):
        prompt("x", "middle")
    with pytest.raises(TrimtabError, match="beside it"):
        PromptSteering("x", vectors=torch.ones(1, 4))
    with pytest.raises(TrimtabError, match="finite"):
        PromptSteering("", vectors=torch.tensor([[float("nan")]]))
    narrow = PromptSteering("", vectors=torch.ones(1, 3))
    with pytest.raises(TrimtabError, match="width"), narrow.on(llama):
        pass
    other = PromptSteering("", vectors=torch.ones(1, llama.d_model), fingerprint="another")
    with pytest.raises(TrimtabError, match="another"), other.on(llama):
        pass
    only_system = [{"role": "system", "content": "x"}]
    with pytest.raises(TrimtabError, match="user"), prompt("x", "prefix").on(llama):
        llama.encode(only_system)
