"""Evaluator.run_many: what run gives, strength by strength."""

import pytest
import torch

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluation, Evaluator, JudgedAnswer
from trimtab.models.model import LanguageModel

STRENGTHS = [0.3, -1.0, 0.0, 1.0, 0.3]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def same(got: Evaluation, want: Evaluation) -> None:
    assert (got.sign, got.scores, got.coherences, got.samples) == (
        want.sign,
        want.scores,
        want.coherences,
        want.samples,
    )
    assert (got.spill_tokens is None) == (want.spill_tokens is None)
    for mine, theirs in (
        (got.damage_tokens, want.damage_tokens),
        (got.spill_tokens or (), want.spill_tokens or ()),
    ):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scope", ["all", "prompt", "last", "post_instruction"])
def test_many_strengths_equal_runs_one_by_one(lm: LanguageModel, scope: str, sign: int) -> None:
    evaluator = Evaluator(lm, planted.behavior(), max_new_tokens=planted.TOKENS)
    vector = planted.push(lm, scope, layers=(2, 3))
    many = evaluator.run_many(vector, STRENGTHS, sign)
    assert len(many) == len(STRENGTHS)
    for strength, got in zip(STRENGTHS, many, strict=True):
        same(got, evaluator.run(vector.at(strength), sign))
    assert many[0].samples != many[2].samples
    assert float(torch.cat(many[1].damage_tokens).max()) > 0.01


def test_zero_is_the_unsteered_model_itself(lm: LanguageModel) -> None:
    evaluator = Evaluator(lm, planted.behavior(), max_new_tokens=planted.TOKENS)
    (zero,) = evaluator.run_many(planted.push(lm), [0.0], 1)
    same(zero, evaluator.run(None, 1))
    assert all(float(kl.abs().sum()) == 0 for kl in zero.damage_tokens)
    assert evaluator.run_many(planted.push(lm), [], 1) == []


def test_without_neutral_prompts_there_is_no_spill(lm: LanguageModel) -> None:
    evaluator = Evaluator(lm, planted.behavior(neutral=()), max_new_tokens=planted.TOKENS)
    (one,) = evaluator.run_many(planted.push(lm), [1.0], 1)
    assert one.spill_tokens is None and one.spill(0) is None


def test_requests_are_scored_where_there_are_some(lm: LanguageModel) -> None:
    behavior = planted.behavior(requests=["Tell me about the boat.", "And the sea?"])
    evaluator = Evaluator(lm, behavior, max_new_tokens=planted.TOKENS, max_prompts=3)
    (one,) = evaluator.run_many(planted.push(lm), [1.0], 1)
    assert [sample.prompt for sample in one.samples] == ["Tell me about the boat.", "And the sea?"]
    assert len(one.damage_tokens) == 3


def test_answers_are_judged_as_in_a_run(lm: LanguageModel) -> None:
    evaluator = Evaluator(lm, planted.behavior(), max_new_tokens=planted.TOKENS)
    run = evaluator.run(planted.push(lm).at(1.0), 1)
    prompts, answers = [s.prompt for s in run.samples], [s.after for s in run.samples]
    judged = evaluator.judged(prompts, answers)
    assert tuple(answer.share(1) for answer in judged) == run.scores
    assert tuple(answer.coherence for answer in judged) == run.coherences
    half = JudgedAnswer(toward=0.5, away=0.25, coherence=0.5)
    assert (half.sound(1), half.sound(-1)) == (0.25, 0.125)
    with pytest.raises(TrimtabError, match="one prompt per answer"):
        evaluator.judged(prompts, answers[1:])
