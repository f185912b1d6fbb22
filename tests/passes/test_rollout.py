"""Answers at many strengths at once are those of `lm.generate`, one strength after the other."""

from collections.abc import Sequence

import pytest
import torch

import tiny
from passes.test_fan import SCOPES, lever
from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.model import LanguageModel
from trimtab.passes import fan as fans
from trimtab.passes import greedy as greedily
from trimtab.passes import rollout as rollouts
from trimtab.passes.rollout import rollout
from trimtab.steering.vector import VectorSteering

PROMPTS = ["How do I borrow the ledger?", "Please talk.", "The cats sleep on the pier at noon."]
STRENGTHS = [-1.0, 0.0, 0.4, 1.5]
TOKENS = 8


def plain(
    lm: LanguageModel, vector: VectorSteering, strengths: Sequence[float], tokens: int = TOKENS
) -> list[list[str]]:
    found = []
    for strength in strengths:
        with vector.at(strength).on(lm):
            found.append(lm.generate(PROMPTS, max_new_tokens=tokens))
    return found


@pytest.mark.parametrize("scope", [*SCOPES, "[15,22)"])
def test_texts_equal_generate(lm: LanguageModel, scope: str) -> None:
    vector = lever(lm, [1, 2], scope)
    want = plain(lm, vector, STRENGTHS)
    assert rollout(lm, vector, PROMPTS, STRENGTHS, max_new_tokens=TOKENS) == want
    # The second window lies in a prompt, and in the answer to a shorter one.
    assert len({tuple(row) for row in want}) > 1


@pytest.mark.parametrize("layers", [[0], [3]])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
def test_lowest_and_highest_layer(llama: LanguageModel, layers: list[int], site: str) -> None:
    vector = lever(llama, layers, "generated", site)
    want = plain(llama, vector, STRENGTHS)
    assert rollout(llama, vector, PROMPTS, STRENGTHS, max_new_tokens=TOKENS) == want


@pytest.mark.parametrize("share", [0.0, 1 / 8, 1.0])
def test_rows_that_end_leave_the_batch(
    llama: LanguageModel, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = lever(llama, [1])
    # Tokens that random answers say soon end them, each row at another time.
    said = plain(llama, vector, STRENGTHS, 30)
    ids = [
        llama.tokenizer(text, add_special_tokens=False)["input_ids"] for row in said for text in row
    ]
    common = torch.tensor([token for row in ids for token in row]).bincount().topk(3).indices
    monkeypatch.setattr(generation, "end_ids", lambda lm: [2, *common.tolist()])
    monkeypatch.setattr(greedily, "ENDED_SHARE", share)
    sizes: list[int] = []
    handle = llama.sites.embedding.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[0])
    )
    try:
        got = rollout(llama, vector, PROMPTS, STRENGTHS, max_new_tokens=30)
    finally:
        handle.remove()
    assert got == plain(llama, vector, STRENGTHS, 30)
    lengths = {len(text) for row in got for text in row}
    assert len(lengths) > 4
    steps = sizes[-12:]
    assert (steps[-1] < max(sizes)) == (share < 1)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_groups_of_other_widths_go_on_together(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Calls that cost nothing by themselves: every length is read by itself.
    monkeypatch.setattr(fans, "CALL_TOKENS", {"cpu": 0})
    lm = tiny.language_model(architecture)
    vector = lever(lm, [1], "last")
    sizes: list[int] = []
    handle = lm.sites.embedding.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[0])
    )
    try:
        got = rollout(lm, vector, PROMPTS, STRENGTHS, max_new_tokens=TOKENS)
    finally:
        handle.remove()
    assert got == plain(lm, vector, STRENGTHS)
    assert max(sizes) == len(PROMPTS) * len(STRENGTHS) == sizes[-(TOKENS - 1)]


@pytest.mark.parametrize("limit", [1, 60_000])
def test_memory_bounds_the_rows_that_go_on_together(
    llama: LanguageModel, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "CACHE_BYTES", limit)
    vector = lever(llama, [2], "last")
    want = plain(llama, vector, STRENGTHS)
    assert rollout(llama, vector, PROMPTS, STRENGTHS, max_new_tokens=TOKENS) == want


def test_a_model_that_does_not_take_part_generates_plainly() -> None:
    lm = tiny.language_model("llama")

    def by_length(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * (output.shape[1] > 1)

    handle = lm.sites.blocks[3].register_forward_hook(by_length)
    vector = lever(lm, [1], "last")
    got = rollout(lm, vector, PROMPTS, STRENGTHS, max_new_tokens=TOKENS)
    assert got == plain(lm, vector, STRENGTHS)
    handle.remove()


def test_a_plain_prompt_and_a_conversation(plain: LanguageModel, llama: LanguageModel) -> None:
    vector = lever(plain, [1], "last")
    with vector.at(1.0).on(plain):
        want = plain.generate("the cats", max_new_tokens=4)
    assert rollout(plain, vector, ["the cats"], [1.0], max_new_tokens=4) == [[want]]
    talk = [{"role": "user", "content": "Please talk."}]
    vector = lever(llama, [1], "post_instruction")
    with vector.at(1.0).on(llama):
        want = llama.generate(talk, max_new_tokens=4)
    assert rollout(llama, vector, [talk], [1.0], max_new_tokens=4) == [[want]]


def test_no_tokens_and_what_is_refused(llama: LanguageModel) -> None:
    vector = lever(llama, [1])
    assert rollout(llama, vector, PROMPTS, [0.0, 1.0], max_new_tokens=0) == [[""] * 3] * 2
    with pytest.raises(TrimtabError, match="no count"):
        rollout(llama, vector, PROMPTS, [1.0], max_new_tokens=-1)
    with pytest.raises(TrimtabError, match="finite"):
        rollout(llama, vector, PROMPTS, [], max_new_tokens=2)
    gpt2 = tiny.language_model("gpt2")
    with pytest.raises(TrimtabError, match="256 positions"):
        rollout(gpt2, lever(gpt2, [1]), PROMPTS, [1.0], max_new_tokens=300)
