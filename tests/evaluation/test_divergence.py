"""KL along answers: against plain torch, alignment under prompt levers, batching, the identity."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.evaluation import divergence
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import prompt
from trimtab.steering.vector import VectorSteering

PROMPTS = [
    "How do I borrow the ledger?",
    "Please talk.",
    "The cats sleep on the pier at noon. Why?",
]
ANSWERS = ["Sure, here is how it works.", "I am sorry, but that is not allowed today.", "No"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny.language_model("llama")


@pytest.fixture
def vector(lm: LanguageModel) -> VectorSteering:
    c = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    return VectorSteering.from_directions(lm, {1: c / c.norm()}, alpha=2.0)


def log_probs(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(lm.model(torch.tensor([ids])).logits[0].double(), dim=-1)


def plain_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_kl_matches_plain_torch_on_every_row(architecture: str) -> None:
    lm = tiny.language_model(architecture)
    c = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    alpha = 1.5
    vector = VectorSteering.from_directions(lm, {1: c / c.norm()}, alpha=alpha)
    measured = Reference(lm, PROMPTS, ANSWERS).kl(vector)
    for row, (text, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        encoded = lm.encode(text, completion=answer)
        before = log_probs(lm, encoded.ids)

        def add(module: object, args: object, output: Any) -> object:
            if isinstance(output, torch.Tensor):
                return output + alpha * c / c.norm()
            return (output[0] + alpha * c / c.norm(), *output[1:])

        handle = lm.sites.blocks[1].register_forward_hook(add)
        after = log_probs(lm, encoded.ids)
        handle.remove()
        window = slice(encoded.prompt_length - 1, len(encoded.ids) - 1)
        expected = plain_kl(before[window], after[window])
        assert measured[row].shape == (len(encoded.ids) - encoded.prompt_length,)
        torch.testing.assert_close(measured[row], expected, rtol=1e-4, atol=1e-6)
    assert min(kl.max().item() for kl in measured) > 0.01


def test_strength_zero_diverges_by_exactly_nothing(
    lm: LanguageModel, vector: VectorSteering
) -> None:
    for kl in Reference(lm, PROMPTS, ANSWERS).kl(vector.at(0.0)):
        assert torch.equal(kl, torch.zeros_like(kl))


def test_a_row_alone_equals_the_row_in_a_batch(lm: LanguageModel, vector: VectorSteering) -> None:
    together = Reference(lm, PROMPTS, ANSWERS).kl(vector)
    for i in range(3):
        (alone,) = Reference(lm, PROMPTS[i : i + 1], ANSWERS[i : i + 1]).kl(vector)
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-6)


def test_small_batches_and_no_cache_give_the_same(
    lm: LanguageModel, vector: VectorSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Reference(lm, PROMPTS, ANSWERS).kl(vector)
    monkeypatch.setattr(divergence, "CACHE_BYTES", 0)
    reference = Reference(lm, PROMPTS, ANSWERS)
    reference.max_tokens = 1  # every row is a batch of its own
    for _ in range(2):
        for measured, wanted in zip(reference.kl(vector), expected, strict=True):
            torch.testing.assert_close(measured, wanted, rtol=1e-4, atol=1e-6)
    assert not reference._kept


@pytest.mark.parametrize("scope", ["all", "last", "post_instruction", "generated", "[3,20)"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_many_strengths_equal_one_after_the_other(architecture: str, scope: str) -> None:
    lm = tiny.language_model(architecture)
    c = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    vector = VectorSteering.from_directions(lm, {1: c, 2: c}, alpha=0.3, scope=scope)
    reference = Reference(lm, PROMPTS, ANSWERS)
    strengths = [-2.0, 0.0, 0.5, 2.0, 0.5]
    many = reference.kl_many(vector, strengths)
    for strength, rows in zip(strengths, many, strict=True):
        for got, want in zip(rows, reference.kl(vector.at(strength)), strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    assert max(float(row.max()) for row in many[0]) > 0.01
    assert all(torch.equal(kl, torch.zeros_like(kl)) for kl in many[1])


def test_many_strengths_without_kept_references(
    lm: LanguageModel, vector: VectorSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = Reference(lm, PROMPTS, ANSWERS).kl_many(vector, [1.0, -1.0])
    monkeypatch.setattr(divergence, "CACHE_BYTES", 0)
    reference = Reference(lm, PROMPTS, ANSWERS)
    for mine, theirs in zip(reference.kl_many(vector, [1.0, -1.0]), want, strict=True):
        for got, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert not reference._kept


def test_many_strengths_of_an_answer_without_a_token() -> None:
    plain = tiny.language_model("llama", template=False)
    plain.tokenizer.eos_token = None
    reference = Reference(plain, PROMPTS[:2], ["", ANSWERS[0]])
    vector = VectorSteering.from_directions(plain, {1: torch.ones(plain.d_model)})
    empty, full = reference.kl_many(vector, [1.0])[0]
    assert empty.shape == (0,) and full.numel() > 0 and float(full.max()) > 0
    assert reference.kl_many(vector, []) == []


def test_a_large_vocabulary_makes_batches_small(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Reference(lm, PROMPTS, ANSWERS).max_tokens == 8192
    large = SimpleNamespace(vocab_size=150_000)
    monkeypatch.setattr(divergence, "text_config", lambda model: large)
    big = Reference(lm, PROMPTS, ANSWERS)
    assert big.max_tokens * 150_000 * 4 <= 2**28


def test_a_prompt_lever_changes_the_context_and_not_the_answer(lm: LanguageModel) -> None:
    lever = prompt("Talk only about cats.")
    measured = Reference(lm, PROMPTS, ANSWERS).kl(lever)
    for row, (text, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        own = lm.encode(text, completion=answer)
        with lever.on(lm):
            there = lm.encode(text, completion=answer)
        assert there.prompt_length > own.prompt_length
        assert there.ids[there.prompt_length :] == own.ids[own.prompt_length :]
        before = log_probs(lm, own.ids)[own.prompt_length - 1 : -1]
        after = log_probs(lm, there.ids)[there.prompt_length - 1 : -1]
        torch.testing.assert_close(measured[row], plain_kl(before, after), rtol=1e-4, atol=1e-6)
    assert lm.system is None
    off = Reference(lm, PROMPTS, ANSWERS).kl(lever.at(0))
    assert all(float(kl.sum()) == 0 for kl in off)


def test_without_a_template_answers_stay_aligned() -> None:
    plain = tiny.language_model("llama", template=False)
    reference = Reference(plain, PROMPTS, ANSWERS)
    context = reference._steered_context(prompt("Talk only about cats."))
    for own, there in zip(reference.encoded, context, strict=True):
        assert there.ids[there.prompt_length :] == own.ids[own.prompt_length :]
        assert len(there.ids) > len(own.ids)


def test_an_answer_tokenized_otherwise_behind_another_prompt_keeps_its_tokens(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = LanguageModel.encode

    def merging(self: LanguageModel, text: str, completion: str | None = None) -> Encoded:
        encoded = encode(self, text, completion)
        if self.system is None:
            return encoded
        start = encoded.prompt_length
        return replace(encoded, ids=[*encoded.ids[:start], 9, *encoded.ids[start + 2 :]])

    monkeypatch.setattr(LanguageModel, "encode", merging)
    reference = Reference(lm, PROMPTS, ANSWERS)
    lever = prompt("Talk only about cats.")
    for own, there in zip(reference.encoded, reference._steered_context(lever), strict=True):
        assert there.ids[there.prompt_length :] == own.ids[own.prompt_length :]
    measured = reference.kl(lever)
    assert [len(kl) for kl in measured] == [len(e.ids) - e.prompt_length for e in reference.encoded]


def test_a_checkpoint_is_compared_like_a_lever(lm: LanguageModel) -> None:
    same = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)
    assert all(float(kl.sum()) == 0 for kl in Reference(lm, PROMPTS, ANSWERS).kl(other=same))
    other = tiny.language_model("llama", seed=5)
    measured = Reference(lm, PROMPTS, ANSWERS).kl(other=other)
    encoded = lm.encode(PROMPTS[1], completion=ANSWERS[1])
    window = slice(encoded.prompt_length - 1, -1)
    expected = plain_kl(log_probs(lm, encoded.ids)[window], log_probs(other, encoded.ids)[window])
    torch.testing.assert_close(measured[1], expected, rtol=1e-4, atol=1e-6)


def test_kl_is_that_of_reference_against_steered_not_the_reverse(
    lm: LanguageModel, vector: VectorSteering
) -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence.token_kl(p, q).item() == pytest.approx(expected, abs=1e-6)


def test_masked_vocabulary_entries_do_not_give_nan() -> None:
    p = torch.tensor([[0.0, -math.inf]])
    q = torch.tensor([[math.log(0.5), math.log(0.5)]])
    assert divergence.token_kl(p, q).item() == pytest.approx(math.log(2))
    assert divergence.token_kl(p, p).item() == 0.0
    assert divergence.token_kl(q, p).item() == math.inf


def test_another_vocabulary_is_refused(lm: LanguageModel) -> None:
    config = tiny.config("llama")
    config.vocab_size = 352
    with pytest.raises(TrimtabError, match="352"):
        Reference(lm, PROMPTS, ANSWERS).kl(other=tiny.language_model(config))


def test_summary_pools_tokens_and_resamples_prompts() -> None:
    rows = [torch.tensor([0.0, 1.0]), torch.tensor([2.0] * 8), torch.empty(0)]
    summed = summarize(rows)
    pooled = torch.cat(rows).double()
    assert summed.mean == pytest.approx(1.7)
    assert summed.p95 == pytest.approx(torch.quantile(pooled, 0.95).item())
    assert (summed.n, summed.tokens) == (2, 10)
    assert summed.low <= summed.mean <= summed.high


def test_an_infinite_divergence_is_said_and_nothing_is_refused() -> None:
    assert summarize([torch.tensor([0.1, math.inf])]).mean == math.inf
    with pytest.raises(TrimtabError, match="single token"):
        summarize([torch.empty(0)])
