"""HotFlip: it ends legal, never rises, finds what brute force finds, and resumes to the same end."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from plain_scorer import PlainScorer
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.prompts.discrete.descent import Descent
from trimtab.prompts.discrete.hotflip import hotflip
from trimtab.prompts.discrete.walk import Buffer
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.task.constraints import Bound, Constraints
from trimtab.prompts.task.rows import PromptRow, lay_out
from trimtab.results.journal import Journal

REQUESTS = ["How do I borrow it?", "Is that allowed today?", "The cats?"]


def rows_of(lm: LanguageModel) -> list[PromptRow]:
    target = lm.tokenizer.encode(" the ferry sleeps", add_special_tokens=False)[:6]
    return lay_out(lm, REQUESTS, targets=[target] * len(REQUESTS))


@pytest.fixture(scope="module")
def rows(llama: LanguageModel) -> list[PromptRow]:
    return rows_of(llama)


@pytest.fixture(scope="module")
def scorer(llama: LanguageModel, rows: list[PromptRow]) -> PlainScorer:
    return PlainScorer(llama, rows)


@pytest.fixture(scope="module")
def bound(llama: LanguageModel, rows: list[PromptRow]) -> Bound:
    return Constraints(words=("cat",), max_chars=30).bind(llama, rows)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_start(bound: Bound, seed: int, length: int = 4) -> tuple[int, ...]:
    tokens = bound.allowed.nonzero()[:, 0]
    return tuple(tokens[torch.randint(len(tokens), (length,), generator=seeded(seed))].tolist())


def test_the_loss_never_rises_and_the_end_is_legal_and_exact(
    scorer: PlainScorer, bound: Bound
) -> None:
    for seed in range(3):
        found = hotflip(
            scorer,
            bound,
            random_start(bound, seed),
            steps=25,
            top_k=16,
            width=16,
            generator=seeded(seed),
        )
        assert all(b <= a for a, b in zip(found.curve, found.curve[1:], strict=False))
        assert found.loss == found.curve[-1] < found.curve[0] - 0.05
        assert bound.explain(found.ids) == {}
        assert found.loss == pytest.approx(scorer.one(found.ids), abs=1e-6)
        assert found.text == bound.text(found.ids)
        assert found.flips > 0 and found.model_calls > 0
        assert len(found.curve) == 26 and found.stopped == "steps"


def test_it_finds_what_brute_force_finds(llama: LanguageModel, rows: list[PromptRow]) -> None:
    spared = llama.tokenizer.encode("the pier so.", add_special_tokens=False)
    spared += llama.tokenizer.encode(" cats talk?", add_special_tokens=False)
    spared = sorted(set(spared))[:9]
    banned = tuple(token for token in range(344) if token not in spared)
    bound = Constraints(tokens=banned).bind(llama, rows)
    scorer = PlainScorer(llama, rows[:2])
    slots = [slot for slot in product(spared, repeat=3) if bound.legal([slot])[0]]
    assert 100 < len(slots) <= 729
    losses = scorer.losses(slots)
    least = float(losses.min())
    for seed in range(3):
        found = hotflip(
            scorer,
            bound,
            slots[int(torch.randint(len(slots), (1,), generator=seeded(seed)))],
            steps=80,
            top_k=9,
            patience=8,
            generator=seeded(seed),
        )
        assert found.loss == pytest.approx(least, abs=1e-5)
        assert found.ids == slots[int(losses.argmin())]
    # Flips alone end in a local optimum from somewhere: swaps and restarts are what gets it out.
    ends = [
        hotflip(
            scorer, bound, slot, steps=80, top_k=9, patience=0, swaps=False, generator=seeded(0)
        )
        for slot in slots[:: len(slots) // 5]
    ]
    assert max(end.loss for end in ends) > least + 1e-3
    assert {end.stopped for end in ends} == {"patience"}


@pytest.mark.parametrize(
    "start",
    [
        "the cats talk so",  # a banned word
        "café é ñ",  # outside the charset
        "How do I borrow the ledger? Please talk",  # too long
    ],
)
def test_an_infeasible_start_is_repaired_and_reported(
    llama: LanguageModel, scorer: PlainScorer, bound: Bound, start: str
) -> None:
    ids = llama.tokenizer.encode(start, add_special_tokens=False)
    violated = bound.explain(ids)
    assert violated
    found = hotflip(scorer, bound, ids, steps=8, top_k=12, generator=seeded(0))
    assert dict(found.violated_start) == violated
    assert found.violations_start == sum(violated.values())
    assert 0 < found.repair_steps <= found.violations_start + len(ids)
    assert bound.legal([found.ids]) == [True]
    assert found.loss <= found.curve[0]


def test_no_start_ends_stuck_infeasible(llama: LanguageModel, rows: list[PromptRow]) -> None:
    """Starts over the whole vocabulary, as an unmasked projection gives them."""
    reference = tuple(llama.tokenizer.encode("Please talk only", add_special_tokens=False))[:6]
    bound = Constraints(
        words=("cat", "talk"), reference=reference, max_overlap=0.25, min_edits=5, max_chars=24
    ).bind(llama, rows)
    scorer = PlainScorer(llama, rows[:1])
    broken = 0
    for seed in range(10):
        start = torch.randint(344, (6,), generator=seeded(seed)).tolist()
        found = hotflip(scorer, bound, start, steps=6, top_k=8, width=16, generator=seeded(seed))
        broken += found.violations_start > 0
        assert bound.explain(found.ids) == {}
        assert found.flips > 0 or found.swaps > 0 or found.restarts > 0
    assert broken == 10


def test_what_cannot_be_legal_is_refused_by_name(
    llama: LanguageModel, scorer: PlainScorer, rows: list[PromptRow]
) -> None:
    start = random_start(Constraints().bind(llama, rows), 0)
    far = Constraints(reference=start, min_edits=5).bind(llama, rows)
    with pytest.raises(TrimtabError, match="edits 1"):
        hotflip(scorer, far, start, generator=seeded(0))
    bound = Constraints(max_chars=2).bind(llama, rows)
    with pytest.raises(TrimtabError, match="chars"):
        hotflip(scorer, bound, start, generator=seeded(0))


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("fast", [False, True])
def test_a_cut_journal_resumes_to_the_same_end(
    llama: LanguageModel, rows: list[PromptRow], bound: Bound, tmp_path: Path, fast: bool
) -> None:
    start = llama.tokenizer.encode("cats é", add_special_tokens=False)

    def once(path: Path | None, scorer: Any = None) -> Descent:
        scorer = scorer or (Kernel(llama, rows) if fast else PlainScorer(llama, rows))
        journal = None if path is None else Journal(path, {"work": "search"})
        generator = seeded(3)
        found = hotflip(
            scorer,
            bound,
            start,
            steps=20,
            top_k=6,
            width=24,
            patience=20,
            generator=generator,
            journal=journal,
            run="second",
        )
        # The caller's stream goes on as if nothing had been resumed.
        assert torch.rand(1, generator=generator).item() == after
        return found

    after = float("nan")
    probe = seeded(3)
    torch.randint(2**53, (1,), generator=probe)
    after = torch.rand(1, generator=probe).item()
    path = tmp_path / "j.jsonl"
    Journal(path, {"work": "search"}).add({"run": "first", "event": "flip", "ids": [1]})
    whole = once(path)
    assert whole.restarts > 0 and whole.repair_steps > 0
    alone = once(None)
    assert (alone.ids, alone.curve) == (whole.ids, whole.curve)
    lines = lines_of(path)
    events = [entry["event"] for entry in Journal(path, {"work": "search"}).entries[1:]]
    assert {"start", "repair", "descend", "flip", "restart", "stop"} <= set(events)
    for kept in range(2, len(lines) + 1, 5):
        cut = tmp_path / f"{kept}.jsonl"
        # The line after the last whole one was being written.
        cut.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:10])
        again = once(cut)
        assert again.ids == whole.ids and again.stopped == whole.stopped
        assert again.curve == pytest.approx(whole.curve, abs=1e-6)
        assert (again.flips, again.swaps, again.restarts, again.scored, again.repair_steps) == (
            whole.flips,
            whole.swaps,
            whole.restarts,
            whole.scored,
            whole.repair_steps,
        )
        assert [e["event"] for e in Journal(cut, {"work": "search"}).entries[1:]] == events


def test_a_finished_run_costs_nothing_and_other_work_is_refused(
    llama: LanguageModel, rows: list[PromptRow], bound: Bound, tmp_path: Path
) -> None:
    start = random_start(bound, 1)

    def once(scorer: PlainScorer, seed: int = 0, steps: int = 5) -> Descent:
        journal = Journal(tmp_path / "j.jsonl", {"work": "search"})
        return hotflip(
            scorer, bound, start, steps=steps, top_k=8, generator=seeded(seed), journal=journal
        )

    whole, idle = once(PlainScorer(llama, rows)), PlainScorer(llama, rows)
    assert once(idle) == whole
    assert idle.counts.calls == idle.counts.gradients == 0
    with pytest.raises(TrimtabError, match="other seed"):
        once(idle, seed=1)
    with pytest.raises(TrimtabError, match="other steps"):
        once(idle, steps=6)


def test_the_seed_repeats_it(scorer: PlainScorer, bound: Bound) -> None:
    runs = [
        hotflip(
            scorer,
            bound,
            random_start(bound, 5),
            steps=70,
            top_k=4,
            generator=seeded(s),
            patience=9,
        )
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0].restarts > 1 and runs[0].curve != runs[2].curve


def test_candidates_are_refilled_from_deeper_in_the_ranking(bound: Bound) -> None:
    tokens = bound.allowed.nonzero()[:, 0].tolist()
    start = random_start(bound, 2)
    ranked = [(token, *start[1:]) for token in tokens]
    legal = [slot for slot, fine in zip(ranked, bound.legal(ranked), strict=True) if fine]
    assert 12 < len(legal) < len(ranked)
    # The first ones of the order are not legal.
    ranked = [slot for slot in ranked if slot not in legal][:20] + legal
    assert bound.first_legal(ranked, 12) == legal[:12]
    assert bound.first_legal(ranked, 12, without=legal[:3]) == legal[3:15]


def test_the_buffer_keeps_the_best_different_ones() -> None:
    buffer = Buffer(2, [(3.0, (1,)), (1.0, (2,)), (2.0, (3,)), (1.0, (2,))])
    assert buffer.entries == [(1.0, (2,)), (2.0, (3,))]
    assert buffer.pop({(2,)}) == (2.0, (3,)) and buffer.pop({(2,)}) is None
    assert buffer.entries == [(1.0, (2,))]


def test_every_architecture_goes_down(lm: LanguageModel) -> None:
    rows = rows_of(lm)[:2]
    bound = Constraints(words=("cat",)).bind(lm, rows)
    start = lm.tokenizer.encode("the cats", add_special_tokens=False)
    found = hotflip(Kernel(lm, rows), bound, start, steps=4, top_k=8, generator=seeded(0))
    assert found.violations_start > 0 and bound.legal([found.ids]) == [True]
    assert found.loss < found.curve[0]
    assert found.loss == pytest.approx(PlainScorer(lm, rows).one(found.ids), abs=1e-4)
