"""What a conversion recovers: 1 for the same lever, 0 for none, between for a weaker one."""

from __future__ import annotations

import pytest
import torch

import planted
from trimtab.evaluation.evaluate import Evaluator
from trimtab.levers.conversions.recovered import gaps_of, recovered
from trimtab.levers.perplexity import Text
from trimtab.levers.timing import extra_time
from trimtab.models.model import LanguageModel

WORDS = {"toward": ["Z"], "away": ["Q"]}


@pytest.fixture(scope="module")
def evaluator(llama: LanguageModel) -> Evaluator:
    return Evaluator(llama, planted.behavior(readout=WORDS), max_new_tokens=4, max_prompts=6)


def test_the_same_lever_recovers_all_and_none_nothing(
    llama: LanguageModel, evaluator: Evaluator
) -> None:
    vector = planted.push(llama)
    same = recovered(llama, evaluator, vector, vector, null=vector.at(0.0))
    assert same.gap is not None and same.gap[0] == pytest.approx(1)
    assert same.null_gap == pytest.approx(0)
    assert same.score is not None and same.score[0] == 1
    assert same.score[1] < 1 < same.score[2]  # as many prompts as these do not prove equality
    nothing = recovered(llama, evaluator, vector, vector.at(0.0))
    assert nothing.gap is not None and nothing.gap[0] == pytest.approx(0, abs=1e-5)
    assert nothing.score is not None and nothing.score[0] == 0
    assert nothing.null_gap is None


def test_a_share_of_the_gap_by_hand(llama: LanguageModel, evaluator: Evaluator) -> None:
    vector = planted.push(llama)
    prompts = evaluator.prompts("away")
    rest, whole, part = (
        gaps_of(llama, evaluator.behavior, prompts, lever)
        for lever in (None, vector, vector.at(0.5))
    )
    assert rest is not None and whole is not None and part is not None
    found = recovered(llama, evaluator, vector, vector.at(0.5))
    assert found.gap is not None
    assert found.gap[0] == pytest.approx(float((part - rest).sum() / (whole - rest).sum()))
    assert found.gap[1] <= found.gap[0] <= found.gap[2]
    away = recovered(llama, evaluator, vector.at(-1.0), vector.at(-0.5), sign=-1)
    assert away.gap is not None and 0 < away.gap[0] < 1


def test_without_readout_words_there_is_no_gap(llama: LanguageModel) -> None:
    bare = Evaluator(llama, planted.behavior(), max_new_tokens=4, max_prompts=3)
    found = recovered(llama, bare, planted.push(llama), planted.push(llama))
    assert found.gap is None and found.effect("before").gap is None
    assert "–" in str(found.table())


def test_perplexity_by_hand(llama: LanguageModel) -> None:
    prompts = ["Please, the pier", "Cats?"]
    text = Text.sampled(llama, prompts, 5, seed=3)
    total = 0.0
    for row in text.rows:
        ids = [*llama.encode(row.request).ids, *row.target]
        with torch.no_grad():
            logits = llama.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        first = len(ids) - len(row.target)
        total -= sum(float(logits[first + t - 1, token]) for t, token in enumerate(row.target))
    expected = torch.tensor(total / text.tokens).exp()
    assert text.perplexity(llama, None) == pytest.approx(float(expected), rel=1e-4)
    assert text.perplexity(llama, llama) == pytest.approx(float(expected), rel=1e-4)
    # Far off the text's own distribution it can only rise.
    assert text.perplexity(llama, planted.push(llama, "all").at(20.0)) > float(expected)
    again = Text.sampled(llama, prompts, 5, seed=3)
    assert [r.target for r in again.rows] == [r.target for r in text.rows]


def test_extra_time_is_of_the_lever(llama: LanguageModel) -> None:
    """A lever that idles is slower by its idling, and the model itself by nothing."""
    import time
    from contextlib import contextmanager

    class Slow:
        @contextmanager
        def on(self, lm: LanguageModel):
            def wait(*_: object) -> None:
                end = time.process_time() + 0.01
                while time.process_time() < end:
                    pass

            handle = lm.sites.trunk.register_forward_pre_hook(wait)
            yield
            handle.remove()

    found = extra_time(llama, {"slow": Slow(), "model": llama}, "Cats?", tokens=3, rounds=3)
    assert 8 < found["slow"] < 60
    assert abs(found["model"]) < found["slow"] / 2
