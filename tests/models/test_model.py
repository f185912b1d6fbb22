from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.fingerprint import fingerprint
from trimtab.models.load import load
from trimtab.models.model import LanguageModel

PROMPTS = [
    "the cats sleep",
    "How do I borrow the ledger?",
    "no",
    "the ferry leaves the pier at noon",
]


def test_what_it_says_about_itself(lm: LanguageModel):
    assert (lm.d_model, lm.n_layers) == (tiny.WIDTH, tiny.LAYERS)
    assert lm.device == torch.device("cpu")
    assert lm.name in repr(lm) and lm.system is None
    assert not lm.model.training
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_system_is_used_while_it_is_set(llama: LanguageModel):
    lm = LanguageModel(llama.model, llama.tokenizer)
    before = lm.encode("the cats")
    lm.system = "Be brief."
    assert "<system>\nBe brief.<end>" in lm.encode("the cats").text
    assert lm.generate("the cats", 8) != LanguageModel(llama.model, llama.tokenizer).generate(
        "the cats", 8
    )
    lm.system = None
    assert lm.encode("the cats") == before


def test_batches(llama: LanguageModel):
    prompts = [f"the {'cats ' * (i % 13)}{i}" for i in range(50)]
    encoded = [llama.encode(prompt, completion="Sure") for prompt in prompts]
    batches = list(llama.batches(encoded, max_tokens=200, max_rows=6))
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(50))
    for batch in batches:
        assert batch.input_ids.shape[0] <= 6 and batch.input_ids.numel() <= 200
        for row, caller in enumerate(batch.rows.tolist()):
            item = encoded[caller]
            real = batch.attention_mask[row].bool()
            assert batch.input_ids[row][real].tolist() == item.ids
            assert real.int().diff().min() >= 0  # padding on the left
            assert int(batch.prompt_length[row]) == item.prompt_length
            assert int(batch.instruction_end[row]) == item.instruction_end
    assert len(list(llama.batches(encoded, max_tokens=1))) == 50
    moved = batches[0].to("meta")
    assert moved.input_ids.is_meta and moved.rows.is_meta


def test_forward_against_single_rows(lm: LanguageModel):
    encoded = [lm.encode(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        for batch in lm.batches(encoded):
            logits = lm.forward(batch)
            assert logits.shape[:2] == batch.input_ids.shape
            assert torch.allclose(lm.forward(batch, logits_to_keep=2), logits[:, -2:], atol=1e-5)
            for row, caller in enumerate(batch.rows.tolist()):
                ids = torch.tensor([encoded[caller].ids])
                want = lm.model(input_ids=ids).logits[0]
                got = logits[row, -len(encoded[caller].ids) :]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_next_logits(lm: LanguageModel):
    got = lm.next_logits(PROMPTS)
    assert got.dtype == torch.float32 and not got.requires_grad
    for prompt, row in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            ids = torch.tensor([lm.encode(prompt).ids])
            want = lm.model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(row, want, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(lm.next_logits(PROMPTS[0]), got[:1], rtol=1e-5, atol=2e-5)


def test_next_logits_unembed_the_last_position_only(llama: LanguageModel):
    shapes = []
    head = llama.sites.unembedding
    handle = head.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[1]))
    llama.next_logits(PROMPTS)
    handle.remove()
    assert shapes == [1]


@torch.no_grad()
def by_hand(lm: LanguageModel, prompt: str, n: int) -> list[int]:
    """Greedy decoding without a library: the answer's tokens."""
    ids = list(lm.encode(prompt).ids)
    start = len(ids)
    for _ in range(n):
        token = int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[start:]


def test_greedy_generation(lm: LanguageModel):
    want = lm.tokenizer.batch_decode(
        [by_hand(lm, prompt, 8) for prompt in PROMPTS], skip_special_tokens=True
    )
    assert lm.generate(PROMPTS, max_new_tokens=8) == want
    assert lm.generate(PROMPTS, max_new_tokens=8, use_cache=False) == want
    assert lm.generate(PROMPTS[1], max_new_tokens=8) == want[1]
    conversation = [{"role": "user", "content": PROMPTS[1]}]
    assert lm.generate(conversation, max_new_tokens=8) == want[1]
    assert lm.generate([conversation, PROMPTS[0]], max_new_tokens=8) == [want[1], want[0]]


def test_sampling_is_seeded_and_leaves_the_global_state(llama: LanguageModel):
    state = torch.random.get_rng_state()
    first = llama.generate(PROMPTS, temperature=1.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(17)
    assert llama.generate(PROMPTS, temperature=1.0, seed=3) == first
    assert llama.generate(PROMPTS, temperature=1.0, seed=4) != first
    assert llama.generate(PROMPTS, temperature=1e-4) == llama.generate(PROMPTS)


def test_sampling_is_from_the_whole_softmax(llama: LanguageModel):
    """No top-k: the first tokens of many samples follow the model's own probabilities."""
    n = 2000
    answers = llama.generate(["the cats"] * n, max_new_tokens=1, temperature=2.0, seed=1)
    probabilities = (llama.next_logits("the cats")[0] / 2.0).softmax(0)
    outside = probabilities.sort(descending=True).indices[50:]
    texts = [llama.tokenizer.decode([token]) for token in range(len(llama.tokenizer))]
    rare = {texts[token] for token in outside.tolist() if token < len(texts)}
    common = set(answers) - rare
    expected = float(probabilities[outside].sum())
    assert expected > 0.05
    assert common and sum(answer in rare for answer in answers) / n == pytest.approx(
        expected, abs=0.06
    )


def test_the_models_own_generation_settings_do_not_leak():
    lm = tiny.language_model("llama")
    want = lm.generate(PROMPTS, max_new_tokens=12)
    sampled = lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0)
    settings = GenerationConfig(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 300)),
        do_sample=True,
        top_k=1,
        min_new_tokens=12,
        eos_token_id=2,
    )
    lm.model.generation_config = settings
    assert lm.generate(PROMPTS, max_new_tokens=12) == want
    assert lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0) == sampled
    assert lm.model.generation_config is settings


def test_an_answer_stops_before_its_end_token():
    lm = tiny.language_model("llama")
    prompt = PROMPTS[1]
    ids = by_hand(lm, prompt, 8)
    assert len(set(ids)) > 2
    # Now the model's settings name another token that ends an answer, as "<|eot_id|>" does.
    stop = ids[-1]
    lm.model.generation_config.eos_token_id = [2, stop]
    short = lm.generate(prompt, max_new_tokens=8)
    assert short == lm.tokenizer.decode(ids[: ids.index(stop)]) != lm.tokenizer.decode(ids)
    assert lm.generate([prompt, "no"], max_new_tokens=8)[0] == short


def test_no_warnings(llama: LanguageModel, caplog: pytest.LogCaptureFixture):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for temperature in (0.0, 0.7):
                llama.generate(PROMPTS, max_new_tokens=3, temperature=temperature)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_no_new_tokens(llama: LanguageModel):
    assert llama.generate("the cats", max_new_tokens=0) == ""
    assert llama.generate(PROMPTS, max_new_tokens=0) == [""] * len(PROMPTS)


@pytest.mark.parametrize(
    "prompt", [[], (), None, 3, [3], [[]], b"x", [None], ["x", 3], {"role": "user"}]
)
def test_what_is_no_prompt_is_refused(llama: LanguageModel, prompt):
    with pytest.raises(TrimtabError):
        llama.generate(prompt)
    with pytest.raises(TrimtabError):
        llama.next_logits(prompt)


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
    ],
)
def test_numbers_out_of_range_are_refused(llama: LanguageModel, option: dict):
    with pytest.raises(TrimtabError):
        llama.generate("the cats", **option)


def test_absolute_positions_end():
    lm = tiny.language_model("gpt2")
    room = 256 - lm.encode("the cats").prompt_length
    assert isinstance(lm.generate("the cats", max_new_tokens=room), str)
    with pytest.raises(TrimtabError, match="256 positions"):
        lm.generate("the cats", max_new_tokens=room + 1)
    with pytest.raises(TrimtabError, match="256 positions"):
        lm.next_logits("cats " * 300)


def test_a_tokenizer_of_another_model(llama: LanguageModel):
    config = tiny.config("llama")
    config.vocab_size = 100
    with pytest.raises(TrimtabError, match="100 embeddings"):
        LanguageModel(tiny.model(config), llama.tokenizer).generate("the cats sleep")


def test_what_is_no_language_model(llama: LanguageModel):
    with pytest.raises(TrimtabError, match="generate"):
        LanguageModel(cast(PreTrainedModel, torch.nn.Linear(2, 2)), llama.tokenizer)


def test_load_a_saved_model(lm: LanguageModel, tmp_path: Path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.fingerprint == lm.fingerprint
    assert not loaded.model.training
    torch.testing.assert_close(loaded.next_logits(PROMPTS), lm.next_logits(PROMPTS))
    assert loaded.generate(PROMPTS, 6) == lm.generate(PROMPTS, 6)
    assert load(str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_load_refuses(llama: LanguageModel, tmp_path: Path):
    missing = tmp_path / "missing"
    with pytest.raises(TrimtabError, match="no such folder"):
        load(missing)
    with pytest.raises(TrimtabError, match="loaded"):
        load(tmp_path)
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(TrimtabError, match="loaded"):
        load(tmp_path)
    weights.unlink()
    # A pickle is never opened, even where it is the only file of weights.
    torch.save(llama.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TrimtabError, match="safetensors"):
        load(tmp_path)


def test_load_refuses_an_unknown_hub_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrimtabError, match="no-such-owner/no-such-model"):
        load("no-such-owner/no-such-model")


def test_fingerprints_tell_models_apart():
    prints = {fingerprint(tiny.model(name)) for name in tiny.ARCHITECTURES}
    assert len(prints) == len(tiny.ARCHITECTURES)
    assert fingerprint(tiny.model("llama")) == fingerprint(tiny.model("llama"))
    assert fingerprint(tiny.model("llama", seed=1)) != fingerprint(tiny.model("llama"))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_fingerprints_survive_casts_of_a_bfloat16_model(architecture: str):
    model = tiny.model(architecture, dtype=torch.bfloat16)
    with torch.no_grad():
        # Values that float16 rounds, or holds as subnormals only, must not matter.
        weight = next(model.parameters())
        weight.view(-1)[:5] = torch.tensor([1e-6, -3e-8, 5e-5, 0.0, -0.0])
    before = fingerprint(model)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.nn.Module.to(model, dtype=dtype)
        assert model.dtype == dtype
        assert fingerprint(model) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_fingerprints_see_any_one_changed_value(architecture: str):
    model = tiny.model(architecture)
    before = fingerprint(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        index = int(torch.randint(parameter.numel(), (1,), generator=generator))
        with torch.no_grad():
            kept = parameter.view(-1)[index].clone()
            parameter.view(-1)[index] += 0.01
        assert fingerprint(model) != before
        with torch.no_grad():
            parameter.view(-1)[index] = kept
    assert fingerprint(model) == before


def test_fingerprints_see_swapped_rows_and_new_biases():
    model = tiny.model("llama")
    before = fingerprint(model)
    down = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        down.weight[[3, 4]] = down.weight[[4, 3]]
    assert fingerprint(model) != before
    with torch.no_grad():
        down.weight[[3, 4]] = down.weight[[4, 3]]
        down.weight[:, [3, 4]] = down.weight[:, [4, 3]]
    assert fingerprint(model) != before
    with torch.no_grad():
        down.weight[:, [3, 4]] = down.weight[:, [4, 3]]
    assert fingerprint(model) == before
    down.bias = torch.nn.Parameter(torch.zeros(tiny.WIDTH))
    assert fingerprint(model) != before


def test_the_fingerprint_follows_an_edit_in_memory():
    lm = tiny.language_model("llama")
    before = lm.fingerprint
    assert lm.fingerprint == before == fingerprint(lm.model)
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[2, 2] += 0.1
    assert lm.fingerprint != before


def test_the_models_own_generation_settings_neither_act_nor_change() -> None:
    """Every setting that the library would fill from the model, with a value that would show."""
    lm = tiny.language_model("llama")
    prompts = ["How do I borrow the ledger?", "Hello"]
    expected = lm.generate(prompts, max_new_tokens=6), lm.generate("Hi", 6, temperature=1.0)
    first = lm.encode(expected[0][0]).ids[2]
    own = GenerationConfig(
        bad_words_ids=[[first]],
        suppress_tokens=[first],
        begin_suppress_tokens=[first],
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=6,
        num_beams=2,
        num_return_sequences=2,
        top_k=1,
        temperature=9.0,
        do_sample=True,
        max_time=1e-9,
        eos_token_id=lm.model.generation_config.eos_token_id,
        a_setting_of_ones_own=1,
    )
    lm.model.generation_config = own
    before = own.to_dict()
    assert (
        lm.generate(prompts, max_new_tokens=6),
        lm.generate("Hi", 6, temperature=1.0),
    ) == expected
    assert lm.model.generation_config is own and own.to_dict() == before
