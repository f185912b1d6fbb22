"""Laws 3 and 4: a scope means the same tokens however the model is called, and exactly those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.models.batch import Batch
from trimtab.models.hooking import first_tensor
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.steering.hooks import Edit, steered
from trimtab.steering.scope import Scope

PROMPTS = ["no", "How do I borrow the ledger? The cats sleep.", "the ferry leaves the pier"]
SCOPES = ("all", "last", "prompt", "post_instruction", "generated", "[0,5)", "[3,14)")
scopes = pytest.mark.parametrize("scope", SCOPES)


def edits(lm: LanguageModel, scope: str, size: float = 2.0) -> list[Edit]:
    """All three operations, at the input, inside and at the output of blocks."""
    generator = torch.Generator().manual_seed(2)
    c, d, e = torch.nn.functional.normalize(torch.randn(3, lm.d_model, generator=generator))
    found = Scope.parse(scope)
    return [
        Edit(Site("resid_post", 1), "add", c, size, scope=found),
        Edit(Site("mlp_out", 2), "affine", d, 0.9, 1.5, found),
        Edit(Site("resid_pre", 3), "ablate", e, 1.0, scope=found),
    ]


def answered(lm: LanguageModel, prompts: list[str]) -> Batch:
    """One batch of prompts with the same answer."""
    batch, *rest = lm.batches([lm.encode(prompt, completion="Sure, here is") for prompt in prompts])
    assert not rest
    return batch


@torch.no_grad()
def in_pieces(lm: LanguageModel, batch: Batch, cuts: list[int]) -> Tensor:
    """Logits of a batch fed in pieces through a KV cache."""
    cache, parts, start = None, [], 0
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with lm.calling(batch):
        for stop in [*cuts, batch.input_ids.shape[1]]:
            output = lm.model(
                input_ids=batch.input_ids[:, start:stop],
                attention_mask=batch.attention_mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = output.past_key_values, stop
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def assert_same(got: Tensor, want: Tensor, batch: Batch) -> None:
    """Equal logits at every real token, relative to their size."""
    real = batch.attention_mask.bool()
    size = max(1.0, float(want[real].abs().max()))
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5 * size)


@torch.no_grad()
def whole(lm: LanguageModel, batch: Batch) -> Tensor:
    return lm.forward(batch)


@scopes
def test_a_row_alone_is_the_row_in_a_batch(lm: LanguageModel, scope: str):
    batch = answered(lm, PROMPTS)
    with steered(lm, edits(lm, scope)):
        together = whole(lm, batch)
        for row, of_caller in enumerate(batch.rows.tolist()):
            single = answered(lm, [PROMPTS[of_caller]])
            width = single.input_ids.shape[1]
            assert_same(together[row : row + 1, -width:], whole(lm, single), single)
    # The scope did something: else the comparison would be empty.
    assert (together - whole(lm, batch)).abs().max() > 0.01


@scopes
def test_more_padding_changes_nothing(lm: LanguageModel, scope: str):
    batch = answered(lm, PROMPTS)
    ids = torch.nn.functional.pad(batch.input_ids, (7, 0), value=5)
    padded = replace(
        batch, input_ids=ids, attention_mask=torch.nn.functional.pad(batch.attention_mask, (7, 0))
    )
    with steered(lm, edits(lm, scope)):
        assert_same(whole(lm, padded)[:, 7:], whole(lm, batch), batch)


@scopes
def test_cache_on_is_cache_off(lm: LanguageModel, scope: str):
    batch = answered(lm, PROMPTS)
    width = batch.input_ids.shape[1]
    prompt = width - int((batch.attention_mask.sum(1) - batch.prompt_length)[0])
    with steered(lm, edits(lm, scope)):
        want = whole(lm, batch)
        assert_same(in_pieces(lm, batch, list(range(prompt, width))), want, batch)
        assert_same(in_pieces(lm, batch, list(range(1, width))), want, batch)


@scopes
def test_chunks_are_the_whole(lm: LanguageModel, scope: str):
    batch = answered(lm, PROMPTS)
    with steered(lm, edits(lm, scope)):
        want = whole(lm, batch)
        for cuts in ([12], [3, 4, 20], [9, 18, 27]):
            inside = [cut for cut in cuts if cut < batch.input_ids.shape[1]]
            assert_same(in_pieces(lm, batch, inside), want, batch)


@scopes
def test_generation_with_and_without_the_cache(lm: LanguageModel, scope: str):
    with steered(lm, edits(lm, scope)):
        cached = lm.generate(PROMPTS, max_new_tokens=8)
        assert lm.generate(PROMPTS, max_new_tokens=8, use_cache=False) == cached
        assert [lm.generate(prompt, max_new_tokens=8) for prompt in PROMPTS] == cached


@contextmanager
def watching(lm: LanguageModel, scope: str) -> Iterator[list[Tensor]]:
    """Which tokens of each call are touched, bool `[batch, seq]`, seen from around the edit."""
    before: list[Tensor] = []
    touched: list[Tensor] = []
    block = lm.sites.blocks[1]

    def early(module: object, args: object, output: object) -> None:
        value = first_tensor(output)
        assert value is not None
        before.append(value)

    def late(module: object, args: object, output: object) -> None:
        value = first_tensor(output)
        assert value is not None
        touched.append((value != before[-1]).any(-1))

    first = block.register_forward_hook(early)
    with steered(lm, edits(lm, scope)[:1]):
        last = block.register_forward_hook(late)
        try:
            yield touched
        finally:
            first.remove()
            last.remove()


@pytest.mark.parametrize("k", [1, 5, 9])
def test_a_window_touches_exactly_k_tokens(lm: LanguageModel, k: int):
    batch = answered(lm, PROMPTS)
    with watching(lm, f"[0,{k})") as touched:
        whole(lm, batch)
        in_pieces(lm, batch, list(range(4, batch.input_ids.shape[1])))
    for once in (touched[0], torch.cat(touched[1:], dim=1)):
        assert once.sum(1).tolist() == [k, k, k]
        positions = batch.attention_mask.cumsum(1) - 1
        assert torch.equal(once, batch.attention_mask.bool() & (positions < k))


@scopes
def test_padding_is_never_touched(lm: LanguageModel, scope: str):
    batch = answered(lm, PROMPTS)
    with watching(lm, scope) as touched:
        whole(lm, batch)
    padding = batch.attention_mask == 0
    assert padding.any() and touched[0].any()
    assert not touched[0][padding].any()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_touches_generated_tokens_only(lm: LanguageModel, use_cache: bool):
    with watching(lm, "generated") as touched:
        lm.generate(PROMPTS, max_new_tokens=6, use_cache=use_cache)
    (prompt,) = [batch.input_ids for batch in lm.batches([lm.encode(text) for text in PROMPTS])]
    assert touched[0].shape == prompt.shape and not touched[0].any()
    # The first answer token is fed in the second call; the last one is never fed.
    assert 2 <= len(touched) <= 6
    for step, call in enumerate(touched[1:], start=1):
        assert call.shape[1] == (1 if use_cache else prompt.shape[1] + step)
        assert call.sum(1).tolist() == [1 if use_cache else step] * len(PROMPTS)
        assert call[:, -1].all()


def test_each_scope_touches_its_tokens(lm: LanguageModel):
    batch = answered(lm, PROMPTS)
    end = batch.prompt_length.tolist()
    start = batch.instruction_end.tolist()
    total = batch.attention_mask.sum(1).tolist()
    expected = {
        "all": total,
        "prompt": end,
        "generated": [t - e for t, e in zip(total, end, strict=True)],
        "last": [t - e + 1 for t, e in zip(total, end, strict=True)],
        "post_instruction": [e - s for e, s in zip(end, start, strict=True)],
    }
    for scope, counts in expected.items():
        with watching(lm, scope) as touched:
            whole(lm, batch)
        assert touched[0].sum(1).tolist() == counts, scope
