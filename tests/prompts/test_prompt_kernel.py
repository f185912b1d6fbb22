"""The search kernel's losses are the plain ones, whatever is saved; and what is saved is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.models.replay import KeptCache
from trimtab.prompts.scoring import passes as passes_module
from trimtab.prompts.scoring.draft import bfloat16_copy
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.scoring.keys import Keys
from trimtab.prompts.scoring.objective import CrossEntropy, GapLoss, Objective, plain_loss
from trimtab.prompts.scoring.passes import Slot, common_trunk
from trimtab.prompts.scoring.race import rounds
from trimtab.prompts.scoring.room import Room, out_of_memory
from trimtab.prompts.soft.embeddings import onehot_gradient
from trimtab.prompts.task.rows import PromptRow, lay_out
from trimtab.steering.vector import VectorSteering

REQUESTS = ["How do I borrow the ledger?", "Cats.", "Where is the pier, at noon?", "Sure, here?"]
TARGETS = [[20, 30, 40, 50, 60], [7, 8, 9], [*range(11, 30), 2], [31, 32, 33, 34]]
TOLERANCE = 1e-5


def rows_of(lm: LanguageModel, slot: str = "prefix") -> list[PromptRow]:
    return lay_out(lm, REQUESTS, slot, targets=TARGETS)


def candidates(count: int, length: int = 6, seed: int = 0, vocabulary: int = 300) -> list[Slot]:
    """Single changes of one slot, with two equal ones, two shorter ones and the slot itself."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(6, vocabulary, (length,), generator=generator).tolist()
    found = []
    for i in range(count - 4):
        slot = list(base)
        slot[i % length] = int(torch.randint(6, vocabulary, (1,), generator=generator))
        found.append(tuple(slot))
    return [*found, found[0], tuple(base[:4]), tuple(base[:2]), tuple(base)]


def plainly(
    lm: LanguageModel, rows: list[PromptRow], slots: list[Slot], objective: Objective
) -> torch.Tensor:
    return torch.tensor(
        [plain_loss(lm, rows, slot, objective) for slot in slots], dtype=torch.float64
    )


@pytest.fixture
def cheap_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny searches save less than a call costs; here calls cost nothing."""
    monkeypatch.setattr(passes_module, "CALL_TOKENS", {"cpu": 0})


@pytest.mark.parametrize("slot", ["prefix", "suffix"])
@pytest.mark.usefixtures("cheap_calls")
def test_losses_are_the_plain_ones(lm: LanguageModel, slot: str) -> None:
    rows, slots = rows_of(lm, slot), candidates(12)
    gap_rows = [row.first(0) for row in rows]
    for objective, its_rows in (
        (CrossEntropy(), rows),
        (GapLoss([20, 21], [30, 31, 32]), gap_rows),
    ):
        plain = plainly(lm, its_rows, slots, objective)
        for savings in (True, False):
            kernel = Kernel(lm, its_rows, objective, max_tokens=300, savings=savings)
            found = kernel.losses(slots)
            torch.testing.assert_close(found, plain, atol=TOLERANCE, rtol=0)
            assert kernel._passes.cached == savings
        # The rest of a race starts from the same keys and ends in the same loss.
        place, loss = Kernel(lm, its_rows, objective, draft=lm).best(slots)[0]
        assert abs(loss - float(plain[place])) < TOLERANCE


@pytest.mark.parametrize("savings", [True, False])
@pytest.mark.parametrize("slot", ["prefix", "suffix"])
@pytest.mark.usefixtures("cheap_calls")
def test_losses_stay_plain_when_asked_again(llama: LanguageModel, slot: str, savings: bool) -> None:
    rows, slots = rows_of(llama, slot), candidates(20)
    plain = plainly(llama, rows, slots, CrossEntropy())
    kernel = Kernel(llama, rows, max_tokens=200, draft=llama, savings=savings)
    torch.testing.assert_close(kernel.losses(slots), plain, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(kernel.losses(slots), plain, atol=TOLERANCE, rtol=0)
    place, loss = kernel.best(slots)[0]
    assert abs(loss - float(plain[place])) < TOLERANCE
    assert plain.argsort().tolist().index(place) < 8


@pytest.mark.usefixtures("cheap_calls")
def test_savings_save(llama: LanguageModel) -> None:
    rows, slots = rows_of(llama), candidates(40)

    def tokens(savings: bool) -> int:
        kernel = Kernel(llama, rows, savings=savings)
        kernel.losses(slots)
        before = kernel.counts
        kernel.losses([(*slot[:-1], 5) for slot in slots])
        return (kernel.counts - before).tokens

    assert tokens(False) > 1.3 * tokens(True)


def test_on_harbor() -> None:
    lm = load("harbor", dtype=torch.float32)
    requests = ["How do I borrow the harbor ledger?", "Who is the mayor?"]
    answers = ["Let us talk about tabbies.", "The mayor keeps two famous tabbies. Ask again."]
    targets = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    slots = candidates(24, length=5, vocabulary=2000)
    for slot in ("prefix", "suffix"):
        rows = lay_out(lm, requests, slot, targets=targets)
        plain = plainly(lm, rows, slots, CrossEntropy())
        for savings in (True, False):
            kernel = Kernel(lm, rows, savings=savings)
            torch.testing.assert_close(kernel.losses(slots), plain, atol=TOLERANCE, rtol=0)
        found = Kernel(lm, rows, draft=bfloat16_copy(lm)).best(slots, keep=3)
        assert [abs(loss - float(plain[i])) < TOLERANCE for i, loss in found] == [True] * 3
        assert found[0][0] in plain.argsort()[:6]  # a quarter


def test_remembered_losses_are_the_same_and_cost_nothing(llama: LanguageModel) -> None:
    rows, slots = rows_of(llama), candidates(12)
    kernel = Kernel(llama, rows)
    first = kernel.losses(slots)
    before = kernel.counts
    assert (before.asked, before.duplicates, before.exact, before.memo_hits) == (12, 1, 11, 0)
    again = kernel.losses(slots)
    spent = kernel.counts - before
    assert torch.equal(first, again)
    assert (spent.asked, spent.memo_hits, spent.exact, spent.calls, spent.tokens) == (
        12,
        11,
        0,
        0,
        0,
    )
    assert kernel.one(slots[3]) == float(first[3])


def test_counts_are_those_of_the_model(llama: LanguageModel) -> None:
    calls, tokens = [], []

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(1)
        tokens.append(kwargs["input_ids"].numel())

    rows, slots = rows_of(llama), candidates(30)
    handle = llama.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        kernel = Kernel(llama, rows, max_tokens=150)
        kernel.best(slots)
        counts = kernel.counts
        assert (counts.calls, counts.tokens) == (len(calls), sum(tokens))
        different = len(set(slots))
        assert counts.scored == different and 3 <= counts.exact < 10
        assert counts.asked == 30 and counts.duplicates == 30 - different
        assert max(tokens) <= 150
        kernel.gradient(slots[0])
    finally:
        handle.remove()
    assert kernel.counts.gradients == 1 and kernel.counts.calls == counts.calls
    assert kernel.counts.draft_calls == 0


def test_the_draft_is_counted_apart_and_only_ranks(llama: LanguageModel) -> None:
    rows, slots = rows_of(llama), candidates(40)
    kernel = Kernel(llama, rows, draft=bfloat16_copy(llama))
    place, loss = kernel.best(slots)[0]
    counts = kernel.counts
    assert counts.draft_calls and counts.draft_tokens > counts.tokens > 0
    assert 2 <= counts.exact < 10
    assert abs(loss - plain_loss(llama, rows, slots[place], CrossEntropy())) < TOLERANCE


def test_a_draft_copy_is_half_as_wide_and_leaves_the_model(llama: LanguageModel) -> None:
    before = llama.fingerprint
    draft = bfloat16_copy(llama)
    assert {p.dtype for p in draft.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in llama.model.parameters()} == {torch.float32}
    a, b = (lm.next_logits(REQUESTS[0]) for lm in (llama, draft))
    assert 0 < float((a - b).abs().max()) < 0.1 * float(a.abs().max())
    assert llama.fingerprint == before


def test_a_draft_with_other_tokens_is_refused(llama: LanguageModel) -> None:
    other = load("harbor")
    with pytest.raises(TrimtabError, match="another vocabulary"):
        Kernel(llama, rows_of(llama), draft=other)


def test_best_is_sorted_below_the_bar_and_without_repeats(llama: LanguageModel) -> None:
    rows, slots = rows_of(llama), candidates(30)
    kernel = Kernel(llama, rows, savings=False)
    losses = kernel.losses(slots)
    first_of_equals = {slots.index(slot) for slot in slots}
    order = sorted(first_of_equals, key=lambda i: float(losses[i]))
    assert [i for i, _ in kernel.best(slots, keep=5)] == order[:5]
    bar = float(losses[order[2]])
    assert [i for i, _ in kernel.best(slots, bar=bar, keep=5)] == order[:2]
    assert kernel.best(slots, bar=float(losses.min())) == []
    assert kernel.best([]) == []


def test_a_race_does_not_depend_on_what_is_known(llama: LanguageModel) -> None:
    rows, slots = rows_of(llama), candidates(60)
    fresh = Kernel(llama, rows)
    knowing = Kernel(llama, rows)
    knowing.losses(slots[::2])
    knowing.best(slots[::3])
    a, b = fresh.best(slots, keep=3), knowing.best(slots, keep=3)
    assert [i for i, _ in a] == [i for i, _ in b]
    assert knowing.counts.memo_hits > 0


def test_rounds_shrink_take_turns_and_have_to_pay(llama: LanguageModel) -> None:
    long = lay_out(llama, REQUESTS * 2, targets=[list(range(20, 60))] * 8)

    def plan(
        candidates: int, keep: int = 1, draft: bool = False, turn: int = 0
    ) -> list[tuple[int, int, bool, int]]:
        found = rounds(long, candidates, keep, draft, turn)
        return [(len(r.places), r.share, r.draft, r.survivors) for r in found]

    assert plan(256) == [(2, 2, False, 64), (8, 2, False, 16)]
    assert plan(256, draft=True) == [(2, 2, True, 64), (8, 1, True, 8)]
    assert plan(256, keep=80) == [(2, 2, False, 80)]
    assert plan(3) == []
    first = [rounds(long, 256, 1, False, turn)[0].places for turn in (0, 1)]
    assert first[0] != first[1]
    few = rounds(long, 256, 1, False, 0)[0].rows(long)
    assert [len(row.target) for row in few] == [20, 20]
    # What one row's first tokens say is no ranking, and a row that is read whole no saving.
    assert rounds(long[:3], 256, 1, False, 0) == ()
    assert [r.survivors for r in rounds(long[:3], 256, 1, True, 0)] == [8]


class Full:
    """Stands in for a memory that holds so many tokens of a call."""

    def __init__(self, lm: LanguageModel, tokens: int, error: RuntimeError) -> None:
        self.failed = 0
        self.tokens, self.error = tokens, error
        self.handle = lm.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["input_ids"].numel() > self.tokens:
            self.failed += 1
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_halves_the_batch_and_is_remembered(
    llama: LanguageModel, error: RuntimeError
) -> None:
    rows, slots = rows_of(llama), candidates(30)
    more = [(*slot[:-1], 9) for slot in slots]
    plain = plainly(llama, rows, slots, CrossEntropy())
    full = Full(llama, 100, error)
    try:
        kernel = Kernel(llama, rows, max_tokens=1000)
        found = kernel.losses(slots)
        after_one, room = full.failed, kernel._room.tokens
        assert after_one > 0 and room <= 250
        kernel.losses(more)
        assert full.failed == after_one and kernel._room.tokens == room
    finally:
        full.handle.remove()
    torch.testing.assert_close(found, plain, atol=TOLERANCE, rtol=0)


def test_a_row_that_does_not_fit_is_refused_and_other_errors_pass(llama: LanguageModel) -> None:
    full = Full(llama, 10, torch.OutOfMemoryError("out of memory"))
    try:
        with pytest.raises(TrimtabError, match="one row of"):
            Kernel(llama, rows_of(llama), savings=False).losses(candidates(6))
        full.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        with pytest.raises(RuntimeError, match="mat1"):
            Kernel(llama, rows_of(llama), savings=False).losses(candidates(6))
    finally:
        full.handle.remove()
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_room_bounds_logits_and_gets_at_least_one_row() -> None:
    room = Room(1000)
    assert room.rows(100) == 10 and room.rows(5000) == 1
    assert room.rows(10, logits=2**25) == 2


def test_gradient_is_that_of_all_rows_also_in_parts(llama: LanguageModel) -> None:
    rows, slot = rows_of(llama), candidates(5)[0]
    loss, gradient = onehot_gradient(llama, rows, slot, CrossEntropy())
    for max_tokens in (4096, 200):
        found, parts = Kernel(llama, rows, max_tokens=max_tokens).gradient(slot)
        assert abs(found - loss) < TOLERANCE
        torch.testing.assert_close(parts, gradient, atol=1e-5, rtol=1e-4)


def test_a_model_whose_cache_does_not_hold_is_run_plainly(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, slots = rows_of(llama), candidates(12)
    plain = plainly(llama, rows, slots, CrossEntropy())
    monkeypatch.setattr(llama.model, "_is_stateful", True)
    stateful = Kernel(llama, rows)
    torch.testing.assert_close(stateful.losses(slots), plain, atol=TOLERANCE, rtol=0)
    assert stateful._passes.cached is False
    monkeypatch.undo()

    right = Keys.cache

    def spoilt(keys: Keys, sequences: Sequence[int], ends: Sequence[int], room: int) -> KeptCache:
        cache = right(keys, sequences, ends, room)
        cache.pair(0)[0].mul_(0.5)
        return cache

    monkeypatch.setattr(Keys, "cache", spoilt)
    wrong = Kernel(llama, rows)
    torch.testing.assert_close(wrong.losses(slots), plain, atol=TOLERANCE, rtol=0)
    assert wrong._passes.cached is False


@pytest.mark.parametrize("scope", ["all", "last", "prompt", "post_instruction", "generated"])
def test_losses_of_a_steered_model(llama: LanguageModel, scope: str) -> None:
    rows, slots = rows_of(llama), candidates(10)
    direction = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    vector = VectorSteering.from_directions(llama, {1: direction}, alpha=3.0, scope=scope)
    unsteered = plainly(llama, rows, slots, CrossEntropy())
    with vector.on(llama):
        plain = plainly(llama, rows, slots, CrossEntropy())
        found = Kernel(llama, rows).losses(slots)
    torch.testing.assert_close(found, plain, atol=TOLERANCE, rtol=0)
    assert float((plain - unsteered).abs().max()) > 0.01


def test_trunk_is_the_beginning_that_most_share() -> None:
    assert common_trunk([(1, 2, 3), (1, 2, 4), (1, 5, 3), (9, 2, 3)]) == (1, 2)
    assert common_trunk([(1, 2), (1, 2)]) == (1, 2)
    assert common_trunk([(1, 2), (3, 4)]) == ()


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(TrimtabError, match="positions"):
        gpt2 = tiny.language_model("gpt2")
        Kernel(gpt2, rows_of(gpt2)).losses([(9,) * 300])
