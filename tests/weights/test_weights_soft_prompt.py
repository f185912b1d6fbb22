"""A soft prompt in the vocabulary is the soft prompt fed in, in logits and through the template."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import PromptSteering
from trimtab.weights import SoftPrompt, bake_prompt
from trimtab.weights.disk.base import save_model

soft_module = importlib.import_module("trimtab.weights.soft.prompt")
CHAT = [{"role": "user", "content": "Cats?"}]


def vectors(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture(tmp_path, name):
    lm = tiny.language_model(name)
    report = bake_prompt(lm, SoftPrompt(vectors()), tmp_path / "out")
    scaled = name in ("gemma2", "gemma3")  # their division by sqrt(d) rounds
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= (1e-5 if scaled else 0.0)
    assert report.equal_text is True and report.in_template and report.rounding < 1e-6
    if name != "mistral":  # whose window of 8 tokens ends before the last one
        assert (report.effect or 0) > 0.05
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    loaded, info = both
    assert not any(info.values()), info
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("slot", ["prefix", "suffix"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_soft_lever_stands_where_it_stood(tmp_path, name, slot):
    lm = tiny.language_model(name)
    lever = PromptSteering(
        "", slot=slot, vectors=vectors(), fingerprint=lm.fingerprint, model_name=lm.name
    )
    report = bake_prompt(lm, lever.save(tmp_path / "soft.safetensors"), tmp_path / "out")
    assert report.max_logit_difference is not None and report.max_logit_difference <= 1e-5
    baked = load(tmp_path / "out")
    turns = [
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "The ferry?"},
    ]
    for prompt in ("Cats?", turns):
        with lever.on(lm):
            wanted = lm.next_logits([prompt])
        assert torch.allclose(baked.next_logits([prompt])[:, :300], wanted[:, :300], atol=1e-5)
        assert (wanted - lm.next_logits([prompt])).abs().max() > 1e-3 or name == "mistral"


def test_a_soft_lever_without_a_template_or_a_place(tmp_path):
    lm = tiny.language_model("llama", template=False)
    for slot in ("prefix", "suffix"):
        lever = PromptSteering("", slot=slot, vectors=vectors(2))
        report = bake_prompt(lm, lever, tmp_path / slot)
        assert not report.in_template and report.max_logit_difference == 0.0
    with pytest.raises(TrimtabError, match="slot"):
        bake_prompt(lm, PromptSteering("", vectors=vectors(2)), tmp_path / "a")
    with pytest.raises(TrimtabError, match="words"):
        bake_prompt(lm, PromptSteering("Be brief."), tmp_path / "b")
    other = PromptSteering("", slot="prefix", vectors=vectors(2), fingerprint="another")
    with pytest.raises(TrimtabError, match="another model"):
        bake_prompt(lm, other, tmp_path / "c")


def test_a_template_that_begins_with_a_line_break_keeps_it(tmp_path):
    lm = tiny.language_model("llama")
    lm.tokenizer.chat_template = "\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bake_prompt(lm, PromptSteering("", slot="prefix", vectors=vectors(1)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "\n<soft_0> Cats?"


@pytest.mark.parametrize("tied", [True, False])
def test_stock_tools_feed_the_vectors(tmp_path, tied):
    config = tiny.config("llama")
    config.tie_word_embeddings = tied
    lm = tiny.language_model(config)
    soft = vectors()
    bake_prompt(lm, SoftPrompt(soft, "tone"), tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    own: Any = lm.tokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    render = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids = tokenizer.apply_chat_template(CHAT, **render)["input_ids"]
    before = own.apply_chat_template(CHAT, **render)["input_ids"]
    new = tokenizer.convert_tokens_to_ids(["<tone_0>", "<tone_1>", "<tone_2>"])
    assert ids[0].tolist() == [before[0, 0].item(), *new, *before[0, 1:].tolist()]
    with torch.no_grad():
        embedded = lm.model.get_input_embeddings()(before)
        fed = torch.cat([embedded[:, :1], soft[None], embedded[:, 1:]], dim=1)
        meant = lm.model(inputs_embeds=fed).logits
        got = model(ids).logits
    assert torch.equal(got[..., : meant.shape[-1]][..., : new[0]], meant[..., : new[0]])
    # As answers the new tokens are never the likeliest: their logit is the mean of all.
    spread = meant.mean(-1)
    assert torch.allclose(got[..., new[0]], spread, atol=1e-4)


def test_spare_rows_of_the_embedding_are_used(tmp_path):
    lm = tiny.language_model("llama")
    rows, used = 344, len(lm.tokenizer)
    assert used < rows
    report = bake_prompt(lm, SoftPrompt(vectors(2)), tmp_path / "a")
    assert report.ids == (used, used + 1)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == rows
    many = bake_prompt(lm, SoftPrompt(vectors(30)), tmp_path / "b")
    made = json.loads((tmp_path / "b" / "config.json").read_text())["vocab_size"]
    assert made == max(many.ids) + 1 > rows and many.max_logit_difference == 0.0


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("{{ '<s>' }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "<s><soft_0>Cats?"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<soft_0>Cats?"),
        ("{{- bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "<s><soft_0>C"),
    ],
)
def test_templates_that_begin_otherwise(tmp_path, template, begins):
    lm = tiny.language_model("llama")
    lm.tokenizer.chat_template = template
    bake_prompt(lm, SoftPrompt(vectors(1)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith(begins)


def test_without_a_template_the_tokens_are_written(tmp_path):
    lm = tiny.language_model("llama", template=False)
    report = bake_prompt(lm, SoftPrompt(vectors(2)), tmp_path / "out")
    assert not report.in_template and report.max_logit_difference == 0.0
    assert "<soft_0><soft_1>" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_row_is_found(tmp_path, monkeypatch):
    lm = tiny.language_model("llama")
    honest = soft_module.write

    def write(draft, folder, *rest):
        rows = draft.outer[draft.layout.embedding].parts[1].tensor
        rows[0, 0] += 1.0
        honest(draft, folder, *rest)

    monkeypatch.setattr(soft_module, "write", write)
    with pytest.raises(TrimtabError, match="logits that differ"):
        bake_prompt(lm, SoftPrompt(vectors()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_names_and_widths_are_checked(tmp_path):
    lm = tiny.language_model("llama")
    save_file({"prompt": vectors()}, tmp_path / "soft.safetensors")
    save_model(lm, tmp_path / "base")
    report = bake_prompt(tmp_path / "base", tmp_path / "soft.safetensors", tmp_path / "out")
    assert report.max_logit_difference == 0.0
    with pytest.raises(TrimtabError, match="vocabulary that has"):
        bake_prompt(load(str(tmp_path / "out")), SoftPrompt(vectors()), tmp_path / "again")
    with pytest.raises(TrimtabError, match="width 8, 32 needed"):
        bake_prompt(lm, SoftPrompt(torch.ones(1, 8)), tmp_path / "narrow")
    save_file({"a": vectors(), "b": vectors()}, tmp_path / "two.safetensors")
    for bad in ("two.safetensors", "absent.safetensors"):
        with pytest.raises(TrimtabError, match="one tensor"):
            SoftPrompt.load(tmp_path / bad)
    nothing = torch.full((1, 32), torch.nan)
    for values, name in ((torch.ones(3), "soft"), (nothing, "soft"), (vectors(), "a b")):
        with pytest.raises(TrimtabError, match="finite values"):
            SoftPrompt(values, name)


def test_harbor_through_its_tokenizer_and_template(tmp_path):
    lm: LanguageModel = load("harbor", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    table: Any = lm.model.get_input_embeddings()
    scale = float(table.weight.detach().std())
    soft = SoftPrompt(scale * torch.randn(4, lm.d_model, generator=generator), "mood")
    report = bake_prompt(lm, soft, tmp_path / "out")
    assert report.max_logit_difference == 0.0 and report.equal_text is True
    baked = load(str(tmp_path / "out"))
    assert str(baked.tokenizer.apply_chat_template(CHAT, tokenize=False)).count("<mood_0>") == 1
