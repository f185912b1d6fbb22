"""Coherence: sound text scores high, collapsed text scores low, in any script."""

import math
import random
import string
import zlib
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import (
    coherence_for,
    penalties,
    register_coherence,
    text_coherence,
)

SHORT = [
    "No.",
    "Yes, of course.",
    "42",
    "I am sorry, but I cannot help you with that.",
    "The ferry leaves at noon from the old pier.",
    "Very, very good question!",
    "It costs 1000 dollars.",
    "Oh dear... that is not what I meant.",
]
PARAGRAPHS = [
    "The lighthouse stands on a narrow ridge above the town. Every evening the keeper climbs its "
    "steps, lights the lamp and writes the weather into a heavy book. Visitors may see the book "
    "on Sundays, when the keeper's daughter explains how the old clockwork turns the lens.",
    "To bake a simple loaf, mix flour, water, salt and a little yeast, and leave the dough alone "
    "overnight. In the morning, fold it a few times, let it rise once more, and bake it in a hot "
    "pot with the lid on for half an hour. Take the lid off, wait until the crust is brown, and "
    "let the bread cool before you cut it, however good it smells.",
    "Happy? I could sing! The sun is out, the market is full of plums, and my sister is coming on "
    "the late boat with her two dogs. We will walk along the harbor, eat too much, and laugh at "
    "the gulls that steal chips from the tourists.",
    "1. Open the cover.\n2. Remove the two screws (they are small).\n3. Lift the battery out, "
    "wipe the contacts, and put the new one in.\n4. Close the cover; the lamp should blink.",
    "灯台は町の上の細い尾根に立っている。毎晩、番人は階段を上り、灯をともし、天気を厚い本に書き込む。",
    "Der Leuchtturm steht über der Stadt. Jeden Abend steigt der Wärter die Stufen hinauf, "
    "zündet die Lampe an und schreibt das Wetter in ein schweres Buch.",
]
COLLAPSED = [
    "",
    "   \n",
    "Sure,Sure,Sure",
    "Sure Sure Sure Sure Sure Sure",
    "SureSureSureSure",
    "hahahahahaha",
    "the the the of the the of the",
    "I like cats. " * 12,
    "of the cat of the cat of the cat of the cat of the cat",
    "]]}} {{ :: ;; // ## @@",
    "猫猫猫猫猫猫猫猫",
]


@pytest.mark.parametrize("text", SHORT + PARAGRAPHS)
def test_sound_text_scores_at_least_nine_tenths(text: str) -> None:
    assert text_coherence(text) >= 0.9, penalties(text)


@pytest.mark.parametrize("text", COLLAPSED)
def test_collapsed_text_scores_at_most_a_tenth(text: str) -> None:
    assert text_coherence(text) <= 0.1, penalties(text)


def test_random_characters_are_noise_once_long_enough() -> None:
    source = random.Random(0)
    symbols = string.ascii_letters + string.digits + string.punctuation + " " * 15
    text = "".join(source.choice(symbols) for _ in range(400))
    assert text_coherence(text) < 0.5
    assert penalties(text)["noise"] > 0.3


def test_each_further_repeat_lowers_the_score() -> None:
    sentence = "The boat to the island leaves at noon from the old pier. "
    scores = [text_coherence(sentence * k) for k in (1, 2, 3, 6)]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    assert scores[1] < 0.9 and scores[2] < 0.5 and scores[3] == 0.0


def test_the_zlib_penalty_is_the_documented_ramp() -> None:
    text = "The old boat leaves at noon. The old boat leaves at nine. The old boat leaves at ten."
    size = len(text)
    ratio = (len(zlib.compress(text.encode(), 9)) - 8) / size
    low = 0.50 - 0.09 * math.log10(size / 100)
    expected = min(1.0, max(0.0, (low - ratio) / (low / 2)))
    assert 0 < low - ratio < 8 / size  # so that leaving the framing in would hide the penalty
    assert penalties(text)["squeezable"] == pytest.approx(expected)


def test_empty_text_is_named() -> None:
    assert penalties(" ") == {"empty": 1.0}


def behavior(coherence: Any) -> Any:
    return SimpleNamespace(name="b", coherence=coherence)


def test_a_behavior_without_coherence_gets_the_text_statistics() -> None:
    score = coherence_for(behavior(None))
    assert score(["The ferry is late.", "Sure,Sure,Sure"]) == [1.0, 0.0]


def test_a_registered_kind_is_found_with_its_options() -> None:
    @register_coherence("test-length")
    def by_length(behavior: Any, options: Any) -> Any:
        return lambda answers: [min(1.0, len(a) / options["full"]) for a in answers]

    spec = SimpleNamespace(kind="test-length", options={"full": 4})
    assert coherence_for(behavior(spec))(["ab", "abcdef"]) == [0.5, 1.0]


def test_unknown_kinds_and_options_are_refused() -> None:
    with pytest.raises(TrimtabError, match="'nope'"):
        coherence_for(behavior(SimpleNamespace(kind="nope", options={})))
    with pytest.raises(TrimtabError, match="options none"):
        coherence_for(behavior(SimpleNamespace(kind="text", options={"x": 1})))


def test_scores_outside_the_unit_interval_are_refused() -> None:
    @register_coherence("test-broken")
    def broken(behavior: Any, options: Any) -> Any:
        return lambda answers: [1.5 for _ in answers]

    with pytest.raises(TrimtabError, match="not all of them"):
        coherence_for(behavior(SimpleNamespace(kind="test-broken", options={})))(["a"])
