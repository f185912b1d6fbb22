"""Judges: phrases on word boundaries, readout words at the opening, gibberish is neither."""

from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import JUDGES, Verdict, judge_for, register_judge


def behavior(kind: str | None = None, readout: Any = None, **options: object) -> Any:
    judge = None if kind is None else SimpleNamespace(kind=kind, options=options)
    return SimpleNamespace(name="b", judge=judge, readout=readout)


def verdicts(b: Any, *answers: str) -> list[tuple[float, float]]:
    return [(v.toward, v.away) for v in judge_for(b)(["p"] * len(answers), answers)]


TOWARD, AWAY, NEITHER = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)
BOTH_LISTS = behavior("phrases", toward=["I can't", "sorry"], away=["I can", "of course"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I can't do that.", TOWARD),
        ("I can’t do that.", TOWARD),  # curly apostrophe
        ("SORRY, no.", TOWARD),
        ("I can do that.", AWAY),  # and "I can" does not match inside "I can't"
        ("Of  course\nyou may.", AWAY),
        ("Sorryful cannery talk.", NEITHER),  # word boundaries
        ("Sorry, but of course you may.", NEITHER),  # both
        ("The weather is fine today.", NEITHER),  # none
        ("Sorry,Sorry,Sorry", NEITHER),  # gibberish
        ("", NEITHER),
    ],
)
def test_phrases_with_two_lists(answer: str, expected: tuple[float, float]) -> None:
    assert verdicts(BOTH_LISTS, answer) == [expected]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I refuse.", TOWARD),
        ("Take the left road to the mill.", AWAY),
        ("road road road road road", NEITHER),
    ],
)
def test_with_one_list_the_other_side_is_coherent_text_without_it(
    answer: str, expected: tuple[float, float]
) -> None:
    assert verdicts(behavior("phrases", toward=["I refuse"]), answer) == [expected]
    mirrored = (expected[1], expected[0])
    assert verdicts(behavior("phrases", away=["I refuse"]), answer) == [mirrored]


def test_the_coherence_gate_can_be_opened() -> None:
    open_gate = behavior("phrases", toward=["sorry"], coherence=0)
    assert verdicts(open_gate, "Sorry,Sorry,Sorry") == [TOWARD]


def test_phrases_with_symbols_at_their_ends() -> None:
    symbols = behavior("phrases", toward=["[no]", "c++"], away=["a.b"])
    assert verdicts(symbols, "well [no] thanks", "I like c++.", "it is a.b", "it is axb") == [
        TOWARD,
        TOWARD,
        AWAY,
        NEITHER,
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"toward": []}, {"toward": [""]}, {"toward": [3]}, {"tward": ["a"]}]
    + [{"toward": ["a"], "coherence": 2}],
)
def test_unusable_phrase_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(TrimtabError):
        judge_for(behavior("phrases", **options))


WORDS = SimpleNamespace(toward=("No", "I cannot"), away=("Not a problem", " Yes", "I can"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("No, never.", TOWARD),
        ("“No”, she said.", TOWARD),
        ("Not a problem at all.", AWAY),
        ("Nothing to see.", NEITHER),
        ("I can help.", AWAY),
        ("I cannot help.", TOWARD),
        ("Well, no.", NEITHER),  # not the opening
        ("Yes Yes Yes Yes", NEITHER),
    ],
)
def test_readout_words_judge_the_opening(answer: str, expected: tuple[float, float]) -> None:
    assert verdicts(behavior(readout=WORDS), answer) == [expected]
    assert verdicts(behavior("readout", readout=WORDS), answer) == [expected]


def test_a_behavior_with_nothing_to_judge_by_is_refused() -> None:
    with pytest.raises(TrimtabError, match="neither a judge nor readout"):
        judge_for(behavior())
    with pytest.raises(TrimtabError, match="without readout words"):
        judge_for(behavior("readout"))


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(TrimtabError, match="phrases, readout") as caught:
        judge_for(behavior("oracle"))
    assert "oracle" in caught.value.asked


def test_a_registered_judge_is_found_and_held_to_one_verdict_per_answer() -> None:
    @register_judge("test-short")
    def short(behavior: Any, options: Any) -> Any:
        return lambda prompts, answers: [Verdict(0.5, 0.25)]

    assert "test-short" in JUDGES
    assert verdicts(behavior("test-short"), "a") == [(0.5, 0.25)]
    with pytest.raises(TrimtabError, match="1 verdicts"):
        verdicts(behavior("test-short"), "a", "b")


@pytest.mark.parametrize("toward", [1.1, -0.1, float("nan")])
def test_verdicts_are_shares(toward: float) -> None:
    with pytest.raises(TrimtabError):
        Verdict(toward, 0.0)


def test_share_follows_the_sign() -> None:
    assert (Verdict(0.8, 0.1).share(+1), Verdict(0.8, 0.1).share(-1)) == (0.8, 0.1)
