"""GCG: better than as many random slots, legal at every step, and resumed to the same end."""

from pathlib import Path

import pytest
import torch

from plain_scorer import PlainScorer
from prompts.test_hotflip import random_start, rows_of, seeded
from trimtab.models.model import LanguageModel
from trimtab.prompts.discrete.descent import Descent
from trimtab.prompts.discrete.gcg import gcg
from trimtab.prompts.task.constraints import Constraints
from trimtab.results.journal import Journal


class Watched(PlainScorer):
    """Remembers every candidate."""

    def best(self, slots, bar=None, keep=1):  # noqa: ANN001
        self.seen = [*getattr(self, "seen", []), *map(tuple, slots)]
        return super().best(slots, bar, keep)


@pytest.mark.parametrize("buffer", [0, 4])
def test_it_beats_as_many_random_slots(llama: LanguageModel, buffer: int) -> None:
    rows = rows_of(llama)[:2]
    bound = Constraints(words=("cat",), max_chars=30).bind(llama, rows)
    gains = []
    for seed in range(3):
        scorer = Watched(llama, rows)
        start = random_start(bound, seed)
        found = gcg(
            scorer, bound, start, steps=8, width=24, top_k=24, buffer=buffer, generator=seeded(seed)
        )
        assert bound.legal(scorer.seen) == [True] * len(scorer.seen)
        assert found.scored == len(scorer.seen) <= 8 * 24 + 300
        assert bound.explain(found.ids) == {}
        assert found.loss == pytest.approx(scorer.one(found.ids), abs=1e-6)
        assert all(b <= a for a, b in zip(found.curve, found.curve[1:], strict=False))
        # As many random legal slots, and the start with them.
        tokens, generator, drawn = bound.allowed.nonzero()[:, 0], seeded(100 + seed), []
        while len(drawn) < found.scored:
            picks = torch.randint(len(tokens), (64, len(start)), generator=generator)
            slots = [tuple(slot) for slot in tokens[picks].tolist()]
            drawn += [s for s, fine in zip(slots, bound.legal(slots), strict=True) if fine]
        random = float(scorer.losses(drawn[: found.scored]).min())
        gains.append(random - found.loss)
    assert min(gains) > 0


def test_candidates_change_one_token_and_are_refilled(llama: LanguageModel) -> None:
    rows = rows_of(llama)[:1]
    bound = Constraints(words=("cat",), max_chars=12).bind(llama, rows)
    scorer = Watched(llama, rows)
    start = next(s for s in map(lambda i: random_start(bound, i), range(99)) if bound.legal([s])[0])
    gcg(scorer, bound, start, steps=1, width=40, top_k=60, generator=seeded(0))
    assert len(set(scorer.seen)) == len(scorer.seen) == 40
    assert {sum(a != b for a, b in zip(start, s, strict=True)) for s in scorer.seen} == {1}
    assert len({i for s in scorer.seen for i in range(4) if s[i] != start[i]}) == 4


def test_a_cut_journal_resumes_to_the_same_end(llama: LanguageModel, tmp_path: Path) -> None:
    rows = rows_of(llama)[:1]
    bound = Constraints(words=("cat",)).bind(llama, rows)
    start = llama.tokenizer.encode("the cats so é", add_special_tokens=False)

    def once(path: Path) -> Descent:
        return gcg(
            PlainScorer(llama, rows),
            bound,
            start,
            steps=5,
            width=10,
            top_k=16,
            buffer=2,
            generator=seeded(0),
            journal=Journal(path, {"work": "search"}),
        )

    path = tmp_path / "j.jsonl"
    whole = once(path)
    assert whole.repair_steps > 0 and whole.loss < whole.curve[0]
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        cut = tmp_path / f"{kept}.jsonl"
        cut.write_bytes(b"".join(lines[:kept]) + b'{"ru')
        again = once(cut)
        assert again == whole
        assert len(cut.read_bytes().splitlines()) == len(lines)
