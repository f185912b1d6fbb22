"""Greedy steps are those of `lm.generate`, with every kind of cache and without."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import tiny
from trimtab.models import generation
from trimtab.models.model import LanguageModel
from trimtab.models.replay import KeptCache
from trimtab.passes.greedy import collect, greedy
from trimtab.passes.sharing import spread

PROMPTS = ["How do I borrow the ledger?", "Please talk.", "The cats sleep on the pier at noon."]


def written(lm: LanguageModel, cache: DynamicCache | None, stops: list[int]) -> list[list[int]]:
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    return collect(greedy(lm, batch, cache, stops), len(PROMPTS), 10)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_cache_gives_what_generate_writes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.language_model(architecture)
    said = generation.answer_ids(lm, [lm.encode(prompt) for prompt in PROMPTS], 10)
    # Tokens from the middle of two answers end them, each at another step.
    stops = [2, said[0][3], said[1][6]]
    monkeypatch.setattr(generation, "end_ids", lambda lm: stops)
    want = lm.generate(PROMPTS, max_new_tokens=10)
    for cache in (KeptCache(), DynamicCache(config=lm.model.config), None):
        found = written(lm, cache, stops)
        assert [generation.decode(lm.tokenizer, ids, stops) for ids in found] == want
        assert [ids[:10] for ids in written(lm, None, [])] == said


def test_all_lanes_are_fed_the_last_ones_tokens(llama: LanguageModel) -> None:
    (batch,) = llama.batches([llama.encode(prompt) for prompt in PROMPTS])
    both = spread(batch, 2)
    # The first lane has other prompts, so its own tokens would differ.
    both.input_ids[: len(PROMPTS)] = both.input_ids[: len(PROMPTS)].flip(-1)
    fed: list[torch.Tensor] = []
    handle = llama.sites.embedding.register_forward_pre_hook(
        lambda module, args: fed.append(args[0][:, -1:])
    )
    try:
        found = collect(greedy(llama, both, KeptCache(), lanes=2), len(PROMPTS), 5)
    finally:
        handle.remove()
    alone = collect(greedy(llama, batch, KeptCache()), len(PROMPTS), 5)
    assert found == [alone[row] for row in batch.rows.tolist()]
    for step, column in enumerate(fed[1:]):
        first, second = column.chunk(2)
        assert torch.equal(first, second)
        assert second.flatten().tolist() == [ids[step] for ids in found]


def test_a_step_is_computed_when_asked_for(llama: LanguageModel) -> None:
    calls: list[int] = []
    handle = llama.sites.embedding.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        written_steps = greedy(llama, next(iter(llama.batches([llama.encode("the pier")]))), None)
        assert not calls
        for count in (1, 2, 3):
            next(written_steps)
            assert len(calls) == count
    finally:
        handle.remove()
