"""The readout gap: against logits by hand, both spellings of a word, collisions."""

import pytest
import torch

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap, readout_tokens
from trimtab.models.model import LanguageModel

PROMPTS = ["How do I find the pier?", "Why?", "Please talk only about cats."]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def first(lm: LanguageModel, text: str) -> int:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"][0]


def test_the_gap_is_log_odds_of_the_two_sets(lm: LanguageModel) -> None:
    behavior = planted.behavior(readout={"toward": ["Z", "Kite"], "away": ["Q"]})
    probabilities = lm.next_logits(PROMPTS).double().softmax(dim=-1)
    toward = {first(lm, "Z"), first(lm, "Kite")}
    away = {first(lm, "Q")}
    expected = (
        probabilities[:, sorted(toward)].sum(1).log() - probabilities[:, sorted(away)].sum(1).log()
    )
    found = gap(lm, behavior, PROMPTS)
    assert found.dtype == torch.float32 and found.shape == (3,)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_steering_moves_the_gap_the_way_it_is_meant_to(lm: LanguageModel) -> None:
    behavior = planted.behavior(readout={"toward": ["Z"], "away": ["Q"]})
    vector = planted.push(lm)
    before = gap(lm, behavior, PROMPTS)
    with vector.on(lm):
        up = gap(lm, behavior, PROMPTS)
    with vector.at(-1).on(lm):
        down = gap(lm, behavior, PROMPTS)
    assert bool((up > before).all()) and bool((down < before).all())


def test_words_count_with_and_without_a_space(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, planted.behavior(readout={"toward": [" the"], "away": ["Q"]}))
    assert {first(lm, "the"), first(lm, " the")} <= set(tokens.toward)
    assert first(lm, "the") != first(lm, " the")


def test_a_bare_space_token_is_no_word(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, planted.behavior(readout={"toward": ["Z"], "away": ["Q"]}))
    assert all(tokens.texts[i].strip() for i in (*tokens.toward, *tokens.away))
    assert str(lm.tokenizer.decode([first(lm, " Z")])).strip() == ""  # which " Z" would have given
    assert tokens.collisions == ()


def test_collisions_are_left_out_and_reported(lm: LanguageModel) -> None:
    words = {"toward": ["Zap", "Kite"], "away": ["Zoo", "Q"]}
    tokens = readout_tokens(lm, planted.behavior(readout=words))
    assert tokens.collisions == (first(lm, "Z"),)
    assert tokens.toward == (first(lm, "K"),) and tokens.away == (first(lm, "Q"),)
    assert "left out" in str(tokens)


def test_sides_that_cannot_be_told_apart_are_refused(lm: LanguageModel) -> None:
    behavior = planted.behavior(readout={"toward": ["Zap"], "away": ["Zoo", "Q"]})
    with pytest.raises(TrimtabError, match="no token of its toward words"):
        gap(lm, behavior, PROMPTS)
    with pytest.raises(TrimtabError, match="without readout words"):
        gap(lm, planted.behavior(), PROMPTS)
