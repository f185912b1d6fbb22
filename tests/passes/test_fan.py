"""Fan: many strengths at once give the logits of the plain loop, whatever is shared."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.passes import fan as fans
from trimtab.passes.fan import Fan
from trimtab.passes.grouping import Costs, Item, groups
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

PROMPTS = [
    "How do I borrow the ledger?",
    "Please talk.",
    "How do I borrow the cats at noon on the pier?",
    "How do I borrow the ferry?",
]
STRENGTHS = [-1.5, 0.0, 0.25, 2.0]
SCOPES = ("all", "last", "prompt", "post_instruction", "generated", "[2,5)")


def lever(
    lm: LanguageModel, layers: Sequence[int], scope: str = "all", site: str = "resid_post"
) -> VectorSteering:
    generator = torch.Generator().manual_seed(3)
    found = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    return VectorSteering.from_directions(lm, found, alpha=0.5, scope=scope, site=site)


def plain(
    lm: LanguageModel, vector: VectorSteering, encoded: Sequence[Encoded], keep: int
) -> Tensor:
    rows = []
    for strength in STRENGTHS:
        with vector.at(strength).on(lm), torch.no_grad():
            for item in encoded:
                (batch,) = lm.batches([item])
                rows.append(lm.forward(batch, logits_to_keep=keep)[0].float())
    return torch.stack(rows).unflatten(0, (len(STRENGTHS), len(encoded)))


def check(fan: Fan, strengths: Sequence[float] = STRENGTHS, keep: int = 1) -> None:
    """Every part equals the plain loop, row by row, and every row comes once."""
    want = plain(fan.lm, fan.vector, fan.encoded, keep)
    seen = torch.zeros(len(strengths), len(fan.encoded))
    for part in fan.parts(strengths):
        for i, place in enumerate(part.strengths):
            for j, prompt in enumerate(part.prompts):
                seen[place, prompt] += 1
                got = part.logits[i, j, -keep:]
                torch.testing.assert_close(got, want[place, prompt], rtol=1e-5, atol=2e-5)
    assert bool((seen == 1).all())
    assert fan.reason == ""


@pytest.mark.parametrize("scope", SCOPES)
def test_logits_equal_the_plain_loop(lm: LanguageModel, scope: str) -> None:
    encoded = [lm.encode(text) for text in PROMPTS]
    for layers in ([1], [3]) if scope == "all" else ([0, 2],):
        check(Fan(lm, lever(lm, layers, scope), encoded))


def test_strengths_matter_and_come_in_order(llama: LanguageModel) -> None:
    fan = Fan(llama, lever(llama, [1]), [llama.encode(text) for text in PROMPTS])
    logits = fan.next_logits(STRENGTHS)
    assert logits.shape == (4, 4, 344) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[1], llama.next_logits(PROMPTS), rtol=1e-5, atol=2e-5)
    assert all(float((logits[i] - logits[1]).abs().max()) > 0.05 for i in (0, 2, 3))
    turned = fan.next_logits(STRENGTHS[::-1])
    torch.testing.assert_close(turned.flip(0), logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "site", ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
)
@pytest.mark.parametrize("operation", ["add", "ablate", "affine"])
def test_every_site_and_operation(llama: LanguageModel, site: str, operation: str) -> None:
    layer = 0 if site == "embed" else 2
    vector = lever(llama, [layer], "post_instruction", site).select(operation=operation)
    check(Fan(llama, vector, [llama.encode(text) for text in PROMPTS]))


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
def test_the_size_of_a_call_does_not_matter(llama: LanguageModel, max_tokens: int) -> None:
    encoded = [llama.encode(text) for text in PROMPTS]
    for scope in ("all", "last"):
        check(Fan(llama, lever(llama, [1], scope), encoded, max_tokens=max_tokens))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("scope", ["all", "last", "[2,9)"])
def test_a_common_beginning_is_run_once_per_strength(
    architecture: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Calls that cost nothing by themselves: everything that can be shared is.
    monkeypatch.setattr(fans, "CALL_TOKENS", {"cpu": 0})
    lm = tiny.language_model(architecture)
    head = "Please talk only about cats. "
    encoded = [lm.encode(head + text) for text in PROMPTS]
    fed: list[int] = []
    handle = lm.sites.embedding.register_forward_pre_hook(
        lambda module, args: fed.append(args[0].numel())
    )
    try:
        fan = Fan(lm, lever(lm, [1], scope), encoded)
        fan.shares(STRENGTHS)
        fed.clear()
        list(fan.parts(STRENGTHS))
        shared = sum(fed)
    finally:
        handle.remove()
    tokens = sum(len(item.ids) for item in encoded)
    assert shared < (len(STRENGTHS) + 1) * tokens - 3 * len(head) // 4
    check(fan)


def test_positions_behind_answers(lm: LanguageModel) -> None:
    encoded = [lm.encode(text, completion="Sure, it works.") for text in PROMPTS]
    count = min(len(item.ids) - item.prompt_length for item in encoded)
    for scope in ("all", "generated"):
        # With two positions before the answer, which some scopes do not change.
        keep = count + 2 if scope == "generated" else count
        check(Fan(lm, lever(lm, [1], scope), encoded, [keep] * len(encoded)), keep=keep)


@pytest.mark.parametrize("scope", ["last", "prompt"])
def test_a_common_beginning_that_is_steered_otherwise_is_not_shared(
    llama: LanguageModel, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fans, "CALL_TOKENS", {"cpu": 0})
    item = llama.encode(PROMPTS[0], completion="Sure, it works.")
    shorter = replace(item, prompt_length=item.prompt_length - 5, instruction_end=2)
    check(Fan(llama, lever(llama, [1], scope), [item, shorter, item]))


def test_prompts_without_a_template(plain: LanguageModel) -> None:
    check(Fan(plain, lever(plain, [2], "last"), [plain.encode(text) for text in PROMPTS]))


def test_unsteered_logits_come_along(llama: LanguageModel) -> None:
    encoded = [llama.encode(text) for text in PROMPTS]
    want = llama.next_logits(PROMPTS)
    for scope in ("all", "last", "generated"):
        for part in Fan(llama, lever(llama, [1], scope), encoded).parts([1.0], unsteered=True):
            assert part.unsteered is not None
            got = part.unsteered[:, -1]
            torch.testing.assert_close(got, want[list(part.prompts)], rtol=1e-5, atol=2e-5)


def test_steering_that_is_active_already_acts_once(llama: LanguageModel) -> None:
    encoded = [llama.encode(text) for text in PROMPTS]
    for scope in ("all", "last"):
        with lever(llama, [0, 1, 3]).at(-0.7).on(llama):
            check(Fan(llama, lever(llama, [1], scope), encoded))


def test_the_model_is_left_as_it_was(llama: LanguageModel) -> None:
    before = llama.next_logits(PROMPTS)
    own = {name: set(vars(module)) for name, module in llama.model.named_modules()}
    fan = Fan(llama, lever(llama, [2]), [llama.encode(text) for text in PROMPTS])
    fan.next_logits(STRENGTHS)
    handle = llama.sites.blocks[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fan.next_logits(STRENGTHS)
    handle.remove()
    assert {name: set(vars(module)) for name, module in llama.model.named_modules()} == own
    assert torch.equal(llama.next_logits(PROMPTS), before)


def test_a_forward_that_a_loader_put_there_is_kept() -> None:
    lm = tiny.language_model("llama")
    block = lm.sites.blocks[1]
    inner = block.forward

    def wrapped(*args: object, **kwargs: object) -> object:
        return inner(*args, **kwargs)

    block.forward = wrapped
    check(Fan(lm, lever(lm, [2]), [lm.encode(text) for text in PROMPTS]))
    assert block.forward is wrapped


def test_a_model_that_answers_otherwise_runs_plainly() -> None:
    """A block that looks at how many tokens it is fed: no pass in parts equals the whole one."""
    lm = tiny.language_model("llama")

    def by_length(module: object, args: object, output: Tensor) -> Tensor:
        return output + 0.1 * output.shape[1]

    handle = lm.sites.blocks[3].register_forward_hook(by_length)
    fan = Fan(lm, lever(lm, [1], "last"), [lm.encode(text) for text in PROMPTS])
    got = fan.next_logits(STRENGTHS)
    assert "differs from a plain one" in fan.reason and fan.reason in fan.plan
    want = []
    for strength in STRENGTHS:
        with fan.vector.at(strength).on(lm):
            want.append(lm.next_logits(PROMPTS))
    handle.remove()
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=2e-5)


def test_a_model_that_refuses_a_cache_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    forward = lm.model.forward

    def without_cache(*args: object, **kwargs: object) -> object:
        if kwargs.get("past_key_values") is not None:
            raise ValueError("this model keeps no keys")
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", without_cache)
    fan = Fan(lm, lever(lm, [1]), [lm.encode(text) for text in PROMPTS])
    logits = fan.next_logits([0.0, 1.0])
    assert "this model keeps no keys" in fan.plan
    torch.testing.assert_close(logits[0], lm.next_logits(PROMPTS))
    parts = list(fan.parts([0.0, 1.0], unsteered=True))
    for part in parts[::2]:
        assert part.unsteered is not None and torch.equal(part.unsteered, part.logits[0])


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_half_precision_differs_by_roundings_only(architecture: str) -> None:
    lm = tiny.language_model(architecture, dtype=torch.bfloat16)
    for scope in ("all", "last"):
        fan = Fan(lm, lever(lm, [1], scope), [lm.encode(text) for text in PROMPTS])
        got, want = fan.next_logits(STRENGTHS), plain(lm, fan.vector, fan.encoded, 1)[:, :, 0]
        assert fan.reason == ""
        assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_the_plan_says_what_is_shared(llama: LanguageModel) -> None:
    encoded = [llama.encode(text) for text in PROMPTS]
    tokens = sum(len(item.ids) for item in encoded)
    fan = Fan(llama, lever(llama, [2], "last"), encoded)
    assert "blocks 0 to 2 of 4" in fan.plan and f"{tokens - 4} of {tokens} tokens" in fan.plan
    assert "no block" in Fan(llama, lever(llama, [0], site="embed"), encoded).plan


def test_what_cannot_be_is_refused(llama: LanguageModel, plain: LanguageModel) -> None:
    encoded = [llama.encode(text) for text in PROMPTS]
    vector = lever(llama, [1])
    with pytest.raises(TrimtabError, match="0 prompts"):
        Fan(llama, vector, [])
    with pytest.raises(TrimtabError, match="at most all"):
        Fan(llama, vector, encoded[:1], [10_000])
    for strengths in ([], [float("nan")]):
        with pytest.raises(TrimtabError, match="all of them finite"):
            Fan(llama, vector, encoded).next_logits(strengths)
    with pytest.raises(TrimtabError, match="no chat template"):
        Fan(plain, lever(plain, [1], "post_instruction"), [plain.encode("the cats")])
    with pytest.raises(TrimtabError, match="width"):
        Fan(llama, VectorSteering({0: torch.eye(3)[0]}, (0,), {0: 1.0}, n_layers=4, d_model=3), [])


def test_groups_hold_every_prompt_once_and_respect_the_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(60):
        length = int(torch.randint(4, 30, (1,), generator=generator))
        head = [7, 7, 7] if i % 2 else [8]
        ids = [*head, *torch.randint(0, 50, (length,), generator=generator).tolist()]
        items.append(Item(tuple(ids), 1, 0))
    costs = Costs(strengths=5, max_tokens=400, max_reads=1000, call_tokens=20)
    found = groups(items, costs)
    assert sorted(i for group in found for i in group) == list(range(60))
    for group in found:
        width = max(len(items[i].ids) for i in group)
        assert len(group) == 1 or len(group) * 5 * width <= 400
    alone = groups(items, Costs(strengths=5, max_tokens=1, max_reads=1, call_tokens=20))
    assert len(alone) == 60


def test_grouping_prefers_a_common_beginning_over_equal_length() -> None:
    """Two families of prompts, each with lengths mixed: the families stay together."""
    items = [
        Item(tuple([family] * 40 + list(range(100, 100 + extra))), 1, 0)
        for extra in (1, 2, 3, 4)
        for family in (1, 2)
    ]
    found = groups(items, Costs(strengths=9, max_tokens=10**6, max_reads=10**6, call_tokens=50))
    assert sorted(sorted(group) for group in found) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_window_behind_the_prompt_changes_nothing(llama: LanguageModel) -> None:
    vector = lever(llama, [1]).select(scope=Scope("window", 500, 501))
    check(Fan(llama, vector, [llama.encode(text) for text in PROMPTS]))
