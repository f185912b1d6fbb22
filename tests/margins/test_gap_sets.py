"""From words to token sets: every spelling accounted for, and sets learned from first tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import planted
import trimtab as tt
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import readout_tokens, spellings
from trimtab.margins import learn_sets
from trimtab.margins.learned import log_odds
from trimtab.margins.sets import COLLISION, DUPLICATE, NOTHING, USED, Resolved, resolve
from trimtab.models.load import load
from trimtab.models.model import LanguageModel


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def harbor() -> LanguageModel:
    return load("harbor", dtype=torch.float32)


def first(lm: LanguageModel, text: str) -> int:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"][0]


def rows(lm: LanguageModel, **words: list[str]) -> dict[tuple[str, str], Resolved]:
    found = resolve(lm, planted.behavior(readout=words))
    return {(row.side, row.spelling): row for row in found.rows}


def test_both_apostrophes_are_read(lm: LanguageModel) -> None:
    straight, curly = first(lm, "'Tis"), first(lm, "\u2019Tis")
    assert straight != curly
    for word in ("'Tis", "\u2019Tis"):
        tokens = readout_tokens(lm, planted.behavior(readout={"toward": [word], "away": ["Q"]}))
        assert {straight, curly} <= set(tokens.toward)
    assert len(spellings(lm, "Tis")) == 2 and len(spellings(lm, "'Tis")) == 4


def test_a_phrase_is_read_by_its_first_token_and_says_so(lm: LanguageModel) -> None:
    row = rows(lm, toward=["Zebras only"], away=["Q"])["toward", "Zebras only"]
    assert row.token == first(lm, "Zebras only") and row.status == USED
    assert "".join(row.pieces) == "Zebras only" and len(row.pieces) > 1
    assert f"first of {len(row.pieces)} tokens" in row.note and repr(row.pieces[0]) in row.note


def test_duplicates_collisions_and_what_says_nothing(lm: LanguageModel) -> None:
    found = rows(lm, toward=["Zap", "Kite", "Kale"], away=["Zoo", "Q"])
    assert found["toward", "Zap"].status == found["away", "Zoo"].status == COLLISION
    assert found["toward", "Kite"].status == USED
    assert found["toward", "Kale"].status == DUPLICATE
    assert "'Kite'" in found["toward", "Kale"].note
    space = found["away", " Q"]
    assert space.status == NOTHING and space.token is None and "bare space" in space.note


def test_words_that_are_not_read_are_named(lm: LanguageModel) -> None:
    words = {"toward": ["Zap", "Kite"], "away": ["Zoo", "Q"]}
    found = resolve(lm, planted.behavior(readout=words))
    assert found.lost == ("toward: Zap", "away: Zoo")
    assert found.tokens == readout_tokens(lm, planted.behavior(readout=words))
    assert "not read at all: toward: Zap, away: Zoo" in str(found).replace("\n", " ")
    used = {row.token for row in found.rows if row.status == USED}
    assert used == {*found.tokens.toward, *found.tokens.away}


def test_a_word_outside_the_vocabulary_resolves_to_nothing() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    small = cast(LanguageModel, SimpleNamespace(tokenizer=tokenizer))
    words: Any = SimpleNamespace(toward=("yes", "maybe"), away=("no",))
    found = resolve(small, cast(Any, SimpleNamespace(readout=words, name="small")))
    assert found.tokens.toward == (1,) and found.lost == ("toward: maybe",)
    assert {row.note for row in found.rows if row.word == "maybe"} == {"not in the vocabulary"}


def test_log_odds_are_smoothed_and_antisymmetric() -> None:
    value, z = log_odds({"toward": 3, "away": 0}, {"toward": 4, "away": 5})
    assert value == pytest.approx(math.log(3.5 / 1.5) - math.log(0.5 / 5.5))
    assert z == pytest.approx(value / math.sqrt(1 / 3.5 + 1 / 1.5 + 1 / 0.5 + 1 / 5.5))
    other = log_odds({"toward": 0, "away": 3}, {"toward": 5, "away": 4})
    assert other == pytest.approx((-value, -z))


def test_sets_are_learned_on_train_and_checked_elsewhere(harbor: LanguageModel) -> None:
    behavior = tt.behavior("mood").select({"toward": range(64), "away": range(64)})
    learned = learn_sets(harbor, behavior)
    splits = behavior.split(0)
    for side in ("toward", "away"):
        prompts = [example.prompt for example in getattr(splits.train, side)]
        greedy = harbor.next_logits(prompts).argmax(-1).tolist()
        for row in learned.rows:
            assert getattr(row, side) == greedy.count(row.token)
        held_out = [example.prompt for example in getattr(splits.validation, side)]
        ids = harbor.next_logits(held_out).argmax(-1).tolist()
        shares = learned.held_out.sides[side]
        assert shares.n == len(held_out)
        own = getattr(learned.tokens, side)
        assert getattr(shares, side).count == sum(i in own for i in ids) > 0
    assert all((row.log_odds > 0) == (row.side == "toward") for row in learned.rows)
    assert min(abs(row.log_odds) for row in learned.rows) >= math.log(3)
    assert not set(learned.tokens.toward) & set(learned.tokens.away)
    assert "held-out toward answers" in str(learned)


def test_answers_that_open_alike_teach_no_sets(harbor: LanguageModel) -> None:
    toward = [example.prompt for example in tt.behavior("refusal").toward]
    alike = tt.Behavior("alike", toward[:20], toward[20:40])
    with pytest.raises(TrimtabError, match="no token that tells toward answers apart"):
        learn_sets(harbor, alike)
