"""Banned words are found however they are dressed, and only they."""

import pytest

from trimtab.errors import TrimtabError
from trimtab.prompts.task.words import Words, fold, inflections, pieces


@pytest.mark.parametrize(
    ("word", "has", "has_not"),
    [
        ("cat", "cat cats catting catlike", "cater cated concatenate scat category catalog"),
        ("Feline", "feline felines", "line felon"),
        ("talk", "talks talked talking talker talkers", "tall stalk"),
        ("kitty", "kitties kitty", "kit kitten"),
        ("fox", "foxes", "foxglove"),
        ("dance", "dancing danced dancer", "dan"),
        ("visit", "visiting visited", "vision"),
        ("mouse", "mice mouser", "mousse"),
        ("wolf", "wolves", "wolverine"),
        ("the", "the", "thing thed ther"),
        ("flow", "flows flowing", "flower flowers"),
        ("corn", "corns", "corner"),
        ("speak", "spoke spoken speaking", "sneak"),
        ("lie", "lies lying lied", "line"),
    ],
)
def test_forms_of_a_word_are_the_word_and_others_are_not(word: str, has: str, has_not: str) -> None:
    forms = inflections(word)
    assert set(has.split()) <= forms
    assert not set(has_not.split()) & forms


@pytest.mark.parametrize(
    "text",
    [
        "f" + "eline",
        "FELINE",
        "fe line",
        "f e l i n e",
        "f-e.l_i\nn1e",
        "félïne",
        "a Feline's bed",
        "ｆｅｌｉｎｅ",
        "fe\u200bline",
        "myFelineFriend",
        "FelInes",
        "so,feline!",
    ],
)
def test_a_word_is_found_in_any_dress(text: str) -> None:
    assert len(Words(["feline"]).found(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "concatenate",
        "scatter",
        "cater to",
        "category",
        "a t",
        "vocative. at",
        "ac at",
        "CATALOG",
        "",
    ],
)
def test_a_word_inside_another_is_not_a_ban(text: str) -> None:
    assert Words(["cat"]).found(text) == []


def test_joining_is_exact_so_neighbors_that_spell_the_word_count() -> None:
    words = Words(["beat", "cat"])
    assert words.found("be at home") == ["beat"]
    assert words.found("to be a table") == []
    assert words.found("c at and ca ts") == ["cat", "cats"]


def test_each_occurrence_counts_once() -> None:
    assert Words(["cat"]).found("cat, CATS; a cat's concatenation") == ["cat", "cats", "cats"]


def test_within_words_when_asked() -> None:
    assert Words(["cat"], whole=False).found("catslea concatenate dog") == ["cats", "cat"]


def test_phrases_and_scripts_without_spaces() -> None:
    assert Words(["talk only"]).found("Talk... ONLY about") == ["talkonly"]
    assert Words(["talk only"]).found("talk about only") == []
    assert Words(["猫"]).found("黒猫が好き") == ["猫"]
    assert Words(["猫"]).found("犬が好き") == []


def test_folding() -> None:
    assert fold("Crème BRÛLÉE ﬁn ß") == "creme brulee fin ss"
    assert pieces("aCatFood e-mail 12x") == ["a", "cat", "food", "e", "mail", "x"]


def test_what_has_no_letters_or_is_no_list_is_refused() -> None:
    with pytest.raises(TrimtabError, match="no letters"):
        inflections("42")
    with pytest.raises(TrimtabError, match="one string"):
        Words("cat")
