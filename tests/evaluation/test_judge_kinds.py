"""Judges by rules, by mood and by language: right answers, wrong ones, empty and broken ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import judge_for

TOWARD, AWAY, NEITHER = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)


def verdicts(kind: str, options: dict[str, Any], *answers: str) -> list[tuple[float, float]]:
    behavior: Any = SimpleNamespace(
        name="b", readout=None, judge=SimpleNamespace(kind=kind, options=options)
    )
    return [(v.toward, v.away) for v in judge_for(behavior)(["p"] * len(answers), answers)]


def test_pattern_takes_all_rules_of_a_side() -> None:
    pirate = {"toward": {"any": [r"\barr+\b", r"\bmatey\b"], "none": ["sorry"], "max_words": 6}}
    assert verdicts(
        "pattern", pirate, "Arrr, me hearty!", "Sorry, matey.", "Hello.", "arr " * 9, " "
    ) == [TOWARD, AWAY, AWAY, AWAY, NEITHER]


def test_pattern_with_two_sides_leaves_the_middle_out() -> None:
    brief = {"toward": {"max_words": 2}, "away": {"min_words": 5}}
    said = verdicts("pattern", brief, "One two.", "one two three", "one two three four five")
    assert said == [TOWARD, NEITHER, AWAY]


def test_pattern_reads_json_as_a_parser_does() -> None:
    answers = (
        '{"a": [1, 2]}',
        'Here you are:\n```json\n{"a": 1}\n```',
        "```\n[1, 2]\n```",
        '{"a": 1',
        '"text"',
    )
    assert verdicts("pattern", {"toward": {"json": True}}, *answers) == [TOWARD] * 3 + [AWAY] * 2


def test_pattern_of_away_alone() -> None:
    assert verdicts("pattern", {"away": {"any": ["no"]}}, "No.", "Yes.") == [AWAY, TOWARD]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "no rules"),
        ({"around": {}}, "around"),
        ({"toward": ["x"]}, "not a mapping"),
        ({"toward": {"any": ["("]}}, "unterminated"),
        ({"toward": {"words": 3}}, "validation error"),
        ({"toward": {"max_words": "few"}}, "validation error"),
    ],
)
def test_pattern_refuses(options: dict[str, Any], found: str) -> None:
    with pytest.raises(TrimtabError, match=found) as refused:
        verdicts("pattern", options, "x")
    assert "pattern" in refused.value.asked and "'b'" in refused.value.asked


def test_sentiment() -> None:
    answers = (
        "I love this wonderful, happy day!",
        "I hate this awful, miserable day.",
        "The table has four legs.",
        "",
    )
    assert verdicts("sentiment", {}, *answers) == [TOWARD, AWAY, NEITHER, NEITHER]
    gloomy = verdicts("sentiment", {"toward": "negative", "threshold": 0.3}, *answers)
    assert gloomy == [AWAY, TOWARD, NEITHER, NEITHER]
    for options in ({"toward": "up"}, {"threshold": 0}, {"threshold": True}, {"mood": "good"}):
        with pytest.raises(TrimtabError, match="sentiment"):
            verdicts("sentiment", options, "x")


def test_language() -> None:
    answers = (
        "El perro duerme en la casa y la niña canta una canción.",
        "The dog sleeps in the house and the girl sings a song.",
        "Der Hund schläft im Haus und das Mädchen singt ein Lied.",
        "Sí.",
        "12 34 56 78",
    )
    assert verdicts("language", {"toward": "es"}, *answers) == [TOWARD, AWAY, AWAY, *[NEITHER] * 2]
    two = verdicts("language", {"toward": "es", "away": "en"}, *answers)
    assert two == [TOWARD, AWAY, NEITHER, NEITHER, NEITHER]
    # Faulty Spanish is Spanish, not a small neighbor of it; whether it is sound, others judge.
    faulty = "La ciela de la ciela es una ciela de la ciela."
    assert verdicts("language", {"toward": "es"}, faulty) == [TOWARD]
    for options in ({}, {"toward": "xx"}, {"toward": "es", "away": "es"}, {"to": "es"}):
        with pytest.raises(TrimtabError, match="language"):
            verdicts("language", options, "x")


@pytest.mark.parametrize(
    ("kind", "module"), [("sentiment", "vaderSentiment"), ("language", "py3langid")]
)
def test_a_missing_library_is_named_with_its_extra(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (module, f"{module}.vaderSentiment", f"{module}.langid"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrimtabError, match=r"trimtab\[judges\]"):
        verdicts(kind, {"toward": "es"} if kind == "language" else {}, "x")
