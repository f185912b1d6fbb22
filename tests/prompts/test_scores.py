"""Scores of prompt levers: definitions on made-up ids, likelihoods against a slow computation."""

from __future__ import annotations

import pytest
import torch

import planted
from trimtab.models.model import LanguageModel
from trimtab.prompts.scores import Scorer, judged, likeness, score
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.task.requests import Requests
from trimtab.prompts.task.rows import slot_ids
from trimtab.prompts.task.teacher import (
    Teacher,
    answers_as_ids,
    target_log_probs,
    teacher,
    teacher_rows,
)
from trimtab.steering.prompt import PromptSteering

END = 2
REQUESTS = Requests(
    ("How is noon?", "Where is the pier?"), ("Is it open?",), ("What is new?", "Who asks?", "Why?")
)
TEXT = "Say Z, please."


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def lesson(model: LanguageModel) -> Teacher:
    return teacher(model, TEXT, REQUESTS, max_new_tokens=6, early=2)


def test_short_answers_miss_what_they_leave_out() -> None:
    target = list(range(10, 20))
    found = likeness([target[:4]], [target], ks=(4, 8))
    assert found.exact.mean == 0
    assert (found.exact_at[4].mean, found.overlap_at[4].mean) == (1, 1)
    assert (found.exact_at[8].mean, found.overlap_at[8].mean) == (0, 0.5)
    nothing = likeness([[]], [target], ks=(4,))
    assert (nothing.exact_at[4].mean, nothing.overlap_at[4].mean) == (0, 0)


def test_a_short_target_counts_its_end_and_no_more() -> None:
    target = [10, 11, END]
    same = likeness([target], [target], ks=(8,))
    assert same.exact.mean == same.exact_at[8].mean == same.overlap_at[8].mean == 1
    longer = likeness([[10, 11, 12, 13]], [target], ks=(8,))
    assert longer.exact.mean == longer.exact_at[8].mean == 0
    assert longer.overlap_at[8].mean == pytest.approx(2 / 3)


def test_overlap_is_position_by_position() -> None:
    found = likeness([[1, 2, 3, 4], [9, 1, 2, 3]], [[1, 2, 3, 4], [1, 2, 3, 4]], ks=(4,))
    assert found.overlap_at[4].mean == 0.5 and found.exact.mean == 0.5
    assert found.exact.low < 0.5 < found.exact.high


def test_targets_are_the_greedy_answers_under_the_reference(
    model: LanguageModel, lesson: Teacher
) -> None:
    lever = PromptSteering(TEXT, slot="prefix")
    for split in ("train", "validation", "test"):
        rows = getattr(lesson, split)
        with lever.on(model):
            answers = model.generate([row.request for row in rows], max_new_tokens=6)
        ends = model.tokenizer.all_special_ids
        for row, answer in zip(rows, answers, strict=True):
            ids = [i for i in row.target if i not in ends]
            assert model.tokenizer.decode(ids) == answer
            assert row.weights == tuple([3.0] * 2 + [1.0] * 4)[: len(row.target)]


def test_from_text_the_reference_reads_as_it_wrote(model: LanguageModel, lesson: Teacher) -> None:
    for row, found in zip(
        lesson.test, target_log_probs(model, lesson.lever, lesson.test), strict=True
    ):
        assert found.shape[0] == len(row.target)
        assert tuple(found.argmax(-1).tolist()) == row.target


def test_cross_entropy_from_text_is_the_plain_loss(model: LanguageModel, lesson: Teacher) -> None:
    scorer = Scorer(model, lesson.lever, lesson.test)
    for text in (TEXT, "Nap on the pier."):
        ids = slot_ids(model, text, lesson.test[0])
        plain = plain_loss(model, lesson.test, ids, CrossEntropy())
        found = scorer.likelihood(PromptSteering(text, slot="prefix"))
        assert found.ce.mean == pytest.approx(plain, abs=1e-5)
        assert found.ce.low <= found.ce.mean <= found.ce.high


def test_excess_and_kl_vanish_for_the_reference_alone(
    model: LanguageModel, lesson: Teacher
) -> None:
    scorer = Scorer(model, lesson.lever, lesson.test)
    own = scorer.likelihood(lesson.lever)
    assert own.excess.mean == own.kl.mean == 0 and own.ce.mean > 0
    bare = scorer.likelihood(None)
    assert bare.kl.mean > 0.01
    assert bare.excess.mean == pytest.approx(bare.ce.mean - own.ce.mean, abs=1e-9)


def test_kl_is_that_of_the_definition(model: LanguageModel, lesson: Teacher) -> None:
    p = target_log_probs(model, lesson.lever, lesson.test)
    q = target_log_probs(model, None, lesson.test)
    slow = [
        float((a[t].double().exp() * (a[t] - b[t]).double()).sum())
        for a, b in zip(p, q, strict=True)
        for t in range(len(a))
    ]
    found = Scorer(model, lesson.lever, lesson.test).likelihood(None)
    assert found.kl.mean == pytest.approx(sum(slow) / len(slow), rel=1e-4)


def test_soft_levers_score_as_the_text_of_their_embeddings(
    model: LanguageModel, lesson: Teacher
) -> None:
    ids = slot_ids(model, TEXT, lesson.test[0])
    vectors = model.model.get_input_embeddings()(torch.tensor(ids)).detach()
    soft = PromptSteering("", slot="prefix", vectors=vectors)
    scorer = Scorer(model, lesson.lever, lesson.test)
    assert scorer.likelihood(soft).kl.mean == pytest.approx(0, abs=1e-6)
    assert scorer.likeness(soft).exact.mean == 1
    assert score(model, soft, scorer).judged is None


def test_rows_alone_and_together_are_the_same(model: LanguageModel, lesson: Teacher) -> None:
    together = target_log_probs(model, None, lesson.test)
    for row, found in zip(lesson.test, together, strict=True):
        (alone,) = target_log_probs(model, None, [row])
        torch.testing.assert_close(alone, found, atol=1e-4, rtol=1e-4)


def test_the_judge_reads_greedy_and_sampled_answers(model: LanguageModel, lesson: Teacher) -> None:
    behavior = planted.behavior()
    pushed = planted.push(model, scope="all").at(3.0)
    found, texts = judged(model, pushed, behavior, lesson.test, max_new_tokens=4, seeds=(0, 1))
    greedy = [text.startswith("Z") for text in texts]
    assert found.greedy.mean == sum(greedy) / len(greedy) == 1
    assert found.seeds == 2 and 0 <= found.sampled.low <= found.sampled.mean <= 1
    again, _ = judged(model, pushed, behavior, lesson.test, max_new_tokens=4, seeds=(0, 1))
    assert again == found
    other, _ = judged(
        model, pushed, behavior, lesson.test, side="away", max_new_tokens=4, seeds=(0,)
    )
    assert other.greedy.mean == 0


def test_sampling_differs_by_seed(model: LanguageModel) -> None:
    drawn = [answers_as_ids(model, None, ["Why?"], 8, 1.0, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_suffixes_too(model: LanguageModel) -> None:
    lever = PromptSteering(" Say Z.", slot="suffix")
    rows = teacher_rows(model, lever, ["Why?", "How is noon?"], 4)
    ids = slot_ids(model, " Say Z.", rows[0])
    scorer = Scorer(model, lever, rows)
    plain = plain_loss(model, rows, ids, CrossEntropy())
    assert scorer.likelihood(lever).ce.mean == pytest.approx(plain, abs=1e-5)
    table = score(model, lever, scorer).table()
    assert "overlap@8" in str(table)
