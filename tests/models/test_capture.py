from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.steering.hooks import Edit, steered

PROMPTS = [
    "the cats",
    "How do I borrow the ledger? Please talk only about cats today.",
    "the ferry leaves the pier",
    "no",
]


def alone(lm: LanguageModel, ids: list[int], layer: int) -> torch.Tensor:
    """Output of one block for one row, `[seq, d_model]`, from a hook of the test's own."""
    seen = []
    block = lm.sites.blocks[layer]
    handle = block.register_forward_hook(
        lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def test_last_positions_in_the_callers_order(lm: LanguageModel):
    encoded = [lm.encode(prompt, completion="Sure") for prompt in PROMPTS]
    got = capture(lm, encoded, [2, 0], positions="last")
    assert got.dtype == torch.float32
    assert got.shape == (4, 2, 1, lm.d_model)
    for row, item in enumerate(encoded):
        for column, layer in enumerate((2, 0)):
            want = alone(lm, item.ids, layer)[item.prompt_length - 1]
            torch.testing.assert_close(got[row, column, 0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [3, "post_instruction", "answer"])
def test_other_positions(llama: LanguageModel, positions: int | str):
    encoded = [llama.encode(prompt, completion="Sure, " + prompt) for prompt in PROMPTS]
    got = capture(llama, encoded, [1], positions=positions)
    for row, item in enumerate(encoded):
        whole, end = alone(llama, item.ids, 1), item.prompt_length
        want = {
            3: whole[end - 3 : end],
            "post_instruction": whole[item.instruction_end : end],
            "answer": whole[end : len(item.ids) - 1].mean(0, keepdim=True),
        }[positions]
        torch.testing.assert_close(got[row, 0], want, rtol=1e-5, atol=1e-5)


def test_the_forward_stops_at_the_deepest_layer(llama: LanguageModel):
    ran: list[int] = []

    def note(number: int) -> Callable[[object, object], None]:
        return lambda module, args: ran.append(number)

    modules = [*llama.sites.blocks, llama.sites.unembedding]
    handles = [m.register_forward_pre_hook(note(i)) for i, m in enumerate(modules)]
    capture(llama, [llama.encode("the cats")], [1, 0])
    capture(llama, [llama.encode("the cats")], [2], site="attn_out")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 0, 1, 2]


def test_nothing_is_left_behind():
    llama = tiny.language_model("llama")  # shared ones may carry hooks that transformers left
    batch = next(llama.batches([llama.encode("the cats")]))
    with torch.no_grad():
        before = llama.forward(batch)
    capture(llama, [llama.encode("the cats")], [0])
    with torch.no_grad():
        assert torch.equal(llama.forward(batch), before)
    assert llama.active_batch is None
    for module in llama.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_steering_acts_before_the_reading(llama: LanguageModel):
    direction = torch.nn.functional.normalize(torch.arange(llama.d_model).float(), dim=0)
    encoded = [llama.encode(prompt) for prompt in PROMPTS]
    before = capture(llama, encoded, [1])
    with steered(llama, [Edit(Site("resid_post", 1), "add", direction, 2.0)]):
        after = capture(llama, encoded, [1])
    torch.testing.assert_close(after - before, (2 * direction).expand_as(after), rtol=0, atol=1e-5)


def test_several_batches_and_progress(llama: LanguageModel):
    encoded = [llama.encode(f"the cats {i}") for i in range(300)]
    calls: list[tuple[int, int]] = []
    got = capture(llama, encoded, [0], progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (300, 300) and len(calls) > 1
    want = alone(llama, encoded[299].ids, 0)[-1]
    torch.testing.assert_close(got[299, 0, 0], want, rtol=1e-5, atol=1e-5)


def test_half_precision_is_read_as_float32():
    lm = tiny.language_model("llama", dtype=torch.bfloat16)
    got = capture(lm, [lm.encode("the cats")], [0])
    assert got.dtype == torch.float32


@pytest.mark.parametrize("positions", ["first", 0, -1, True, 1.5])
def test_unknown_positions(llama: LanguageModel, positions):
    with pytest.raises(TrimtabError, match="positions"):
        capture(llama, [llama.encode("the cats")], [0], positions=positions)


def test_refusals(llama: LanguageModel, plain: LanguageModel):
    encoded = [llama.encode("the cats")]
    with pytest.raises(TrimtabError, match="completion"):
        capture(llama, encoded, [0], positions="answer")
    with pytest.raises(TrimtabError, match="completion"):
        capture(llama, [llama.encode("the cats", completion="")], [0], positions="answer")
    with pytest.raises(TrimtabError, match="last 99"):
        capture(llama, encoded, [0], positions=99)
    with pytest.raises(TrimtabError, match="template"):
        capture(plain, [plain.encode("the cats")], [0], positions="post_instruction")
    with pytest.raises(TrimtabError, match="layers"):
        capture(llama, encoded, [4])
    with pytest.raises(TrimtabError, match="site"):
        capture(llama, encoded, [0], site="resid")
