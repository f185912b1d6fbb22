"""recovery(): the stream before, at and behind a push, and the answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conftest import tiny_model
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import JudgedAnswer
from trimtab.models.model import LanguageModel
from trimtab.prediction.recovery import LARGE, Recovery, recovery
from trimtab.steering.vector import VectorSteering

PROMPTS = ["Hello there", "How do I find the ferry?", "Where is the pier?"]


def push(lm: LanguageModel, layers: tuple[int, ...] = (2,), **more: Any) -> VectorSteering:
    directions = {
        k: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(k)) for k in layers
    }
    return VectorSteering.from_directions(lm, directions, **more)


def run(lm: LanguageModel, vector: VectorSteering, *strengths: float, **more: Any) -> Recovery:
    return recovery(lm, vector, PROMPTS, strengths, max_new_tokens=4, **more)


def test_before_the_push_the_stream_is_its_own(lm: LanguageModel) -> None:
    for row in run(lm, push(lm), 0.5, 50.0).rows:
        assert row.distance[:2] == pytest.approx((0, 0), abs=1e-6)
        assert row.cosine[:2] == pytest.approx((1, 1), abs=1e-6)
        assert row.distance[2] > 1e-3 and row.cosine[2] < 1 - 1e-6
        assert len(row.distance) == len(row.cosine) == 4


def test_at_the_push_the_distance_is_its_length(llama: LanguageModel) -> None:
    vector, prompt = push(llama), PROMPTS[0]
    small, large = recovery(llama, vector, [prompt], [1.0, 1000.0], max_new_tokens=1).rows
    assert large.distance[2] == pytest.approx(1000 * small.distance[2], rel=1e-3)
    # So far out the stream points along the push alone.
    opposite = recovery(llama, vector, [prompt], [-1000.0], max_new_tokens=1).rows[0]
    assert opposite.cosine[2] == pytest.approx(-large.cosine[2], abs=1e-2)


def test_a_tiny_strength_changes_nothing(lm: LanguageModel) -> None:
    faint, none = run(lm, push(lm), 1e-6, 0.0).rows
    for row in (faint, none):
        assert max(row.distance) < 1e-4 and min(row.cosine) > 1 - 1e-6
        assert (row.same_first, row.same_answer) == (1.0, 1.0)
    assert max(none.distance) == 0.0


def test_a_large_push_changes_the_answers(llama: LanguageModel) -> None:
    (row,) = run(llama, push(llama), 1000.0).rows
    assert row.same_first < 1 and row.same_answer < 1
    with push(llama).at(1000.0).on(llama):
        after = llama.next_logits(PROMPTS).argmax(-1)
    before = llama.next_logits(PROMPTS).argmax(-1)
    assert row.same_first == pytest.approx(float((after == before).double().mean()))


def test_blocks_that_take_the_stream_back_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    block: Any = lm.sites.blocks[3]
    inner, kept = block.forward, {}

    def forgetful(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.setdefault(tuple(hidden.shape), inner(hidden, *args, **kwargs))
        return kept[tuple(hidden.shape)]

    monkeypatch.setattr(block, "forward", forgetful)
    (row,) = recovery(lm, push(lm), PROMPTS[:1], [100.0], max_new_tokens=1).rows
    assert row.distance[2] > 1 and row.distance[3] == 0.0 and row.cosine[3] == pytest.approx(1)
    assert row.same_first == 1.0


def test_a_row_per_strength_in_the_order_given(llama: LanguageModel) -> None:
    found = run(llama, push(llama, (1, 2)), 3.0, -1.0, 0.5)
    assert [row.strength for row in found.rows] == [3.0, -1.0, 0.5]
    assert found.layers == (1, 2) and found.prompts == 3 and found.scope == "all"
    table = found.table()
    assert [row[0] for row in table.rows] == ["+3", "-1", "+0.5"] and "layers 1, 2" in table.title
    assert table.rows[0][-1] == "–"  # no scorer of coherence


def test_by_default_the_vectors_own_strength_is_multiplied(llama: LanguageModel) -> None:
    found = recovery(llama, push(llama).at(-0.5), PROMPTS[:1], max_new_tokens=1)
    assert [row.strength for row in found.rows] == [-0.5 * factor for factor in LARGE]


def test_coherence_is_the_mean_of_the_scorer(llama: LanguageModel) -> None:
    class Judge:
        def judged(self, prompts: Any, answers: list[str]) -> list[JudgedAnswer]:
            assert prompts == PROMPTS
            each = zip(answers, [0.0, 1.0, 1.0], strict=True)
            return [JudgedAnswer(0.0, 0.0, coherence) for _, coherence in each]

    (row,) = run(llama, push(llama), 1.0, evaluator=Judge()).rows
    assert row.coherence == pytest.approx(2 / 3)


def test_a_scope_that_leaves_the_last_token_out_moves_it_less(llama: LanguageModel) -> None:
    every = run(llama, push(llama), 1.0).rows[0]
    first = run(llama, push(llama, scope="[0,1)"), 1.0).rows[0]
    assert first.distance[2] == pytest.approx(0, abs=1e-6)
    assert 0 < first.distance[3] < every.distance[3]  # through the last block's attention


def test_it_is_saved(tmp_path: Path) -> None:
    found = run(tiny_model("gpt2"), push(tiny_model("gpt2")), 10.0)
    (row,) = json.loads(found.save(tmp_path / "r.json").read_text())["rows"]
    assert row["distance"] == list(found.rows[0].distance) and row["coherence"] is None


def test_strengths_that_are_not_finite_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="strength"):
        run(llama, push(llama), math.inf)


def test_no_prompts_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="at least one prompt"):
        recovery(llama, push(llama), [], [1.0])
