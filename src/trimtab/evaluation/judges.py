"""Judges: what scores an answer. A judge sees text only, never how the text was steered.

Add one with a function that builds it:

>>> @register_judge("shouting")
... def shouting(behavior, options):
...     return lambda prompts, answers: [
...         Verdict(toward=float(a.isupper()), away=float(a.islower())) for a in answers
...     ]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import check_options, text_coherence
from trimtab.results.registry import Registry

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.chat import Prompt

Options = Mapping[str, object]
Judge = Callable[[Sequence["Prompt"], Sequence[str]], list["Verdict"]]
JudgeFactory = Callable[["Behavior", Options], Judge]

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "＇": "'", "`": "'"})


@dataclass(frozen=True)
class Verdict:
    """How far an answer shows the behavior and how far its opposite, each in [0, 1].

    Both are 0 for an answer that is neither, gibberish above all.
    """

    toward: float
    away: float

    def __post_init__(self) -> None:
        """Refuse anything that is not a share; NaN fails the comparison too."""
        if not (0 <= self.toward <= 1 and 0 <= self.away <= 1):
            raise TrimtabError(
                asked="a verdict",
                found=f"toward {self.toward}, away {self.away}",
                advice="let the judge return two numbers from 0 to 1",
            )

    def share(self, sign: int) -> float:
        """Return the side that a strength of this sign is meant to raise."""
        return self.toward if sign > 0 else self.away


NEITHER = Verdict(0.0, 0.0)
# One file each in `kinds`, imported when it is first asked for.
KINDS = ("language", "pattern", "sentiment")


JUDGES: Registry[JudgeFactory] = Registry(
    "judge",
    group="trimtab.judges",
    later={
        "harbor": "trimtab.harbor.scoring:harbor_judge",
        **{kind: f"trimtab.evaluation.kinds.{kind}:{kind}" for kind in KINDS},
    },
)
register_judge = JUDGES.register


def judge_for(behavior: Behavior) -> Judge:
    """Build the judge that the behavior names; without one, its readout words judge.

    Returns:
        A function of prompts and answers that gives one verdict per answer.

    Raises:
        TrimtabError: for an unknown kind, unusable options, or nothing to judge by.
    """
    kind = judge_kind(behavior)
    options = {} if behavior.judge is None else behavior.judge.options
    factory = JUDGES.get(kind, f"the behavior {behavior.name!r}")
    return _checked(factory(behavior, options), kind)


def judge_kind(behavior: Behavior) -> str:
    """Return the kind of judge that `judge_for` builds.

    Raises:
        TrimtabError: when the behavior has neither a judge nor readout words.
    """
    if behavior.judge is not None:
        return behavior.judge.kind
    if behavior.readout is not None:
        return "readout"
    raise TrimtabError(
        asked=f"a judge for the behavior {behavior.name!r}",
        found="neither a judge nor readout words",
        advice=f"give it judge: with a kind ({', '.join(JUDGES)}), or readout words",
    )


def _checked(judge: Judge, kind: str) -> Judge:
    """Hold a judge to one verdict per answer: a short list would shift scores between prompts."""

    def run(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        verdicts = list(judge(prompts, answers)) if len(prompts) == len(answers) else []
        if len(prompts) != len(answers) or len(verdicts) != len(answers):
            raise TrimtabError(
                asked=f"verdicts of the judge {kind!r} on {len(answers)} answers",
                found=f"{len(prompts)} prompts, {len(verdicts)} verdicts",
                advice="pass one prompt per answer and return one verdict per answer, in order",
            )
        return verdicts

    return run


@register_judge("phrases")
def phrases(behavior: Behavior, options: Options) -> Judge:
    """Judge by phrases: toward if one of `toward` occurs and none of `away`, and the reverse.

    Phrases match on word boundaries, in any case, with straight or curly apostrophes; `I can` does
    not match `I can't`. Both or neither: neither. With one list only, the other side is "coherent
    and without these phrases". Answers less coherent than `coherence` (default 0.5, by
    text_coherence) are neither. Phrase rules are known to misfire, e.g. on quotations; read some
    answers.
    """
    check_options("judge 'phrases'", options, {"toward", "away", "coherence"})
    toward = _pattern(_strings(options, "toward"))
    away = _pattern(_strings(options, "away"))
    floor = _number(options, "coherence", 0.5)
    if toward is None and away is None:
        raise TrimtabError(
            asked=f"the judge 'phrases' of the behavior {behavior.name!r}",
            found="no phrases",
            advice="give options toward: [...] or away: [...], or both",
        )
    return lambda prompts, answers: [_phrase_verdict(a, toward, away, floor) for a in answers]


@register_judge("readout")
def readout(behavior: Behavior, options: Options) -> Judge:
    """Judge by how the answer opens: with one of the behavior's readout words of one side.

    The sampled counterpart of the gap (see readout.gap, which reads the model's log-odds instead).
    The longest matching word decides, so `No` and `Not` may stand on different sides.
    """
    check_options("judge 'readout'", options, {"coherence"})
    words = behavior.readout
    if words is None:
        raise TrimtabError(
            asked=f"the judge 'readout' of the behavior {behavior.name!r}",
            found="a behavior without readout words",
            advice="give it readout: toward and away words, or another judge",
        )
    floor = _number(options, "coherence", 0.5)

    def opening(text: str, candidates: Sequence[str]) -> int:
        matched = [w for w in map(_normal, candidates) if _opens(text, w)]
        return max(map(len, matched), default=0)

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for answer in answers:
            text = _normal(answer)
            toward, away = opening(text, words.toward), opening(text, words.away)
            if toward == away or text_coherence(answer) < floor:
                verdicts.append(NEITHER)
            else:
                verdicts.append(Verdict(float(toward > away), float(away > toward)))
        return verdicts

    return judge


def _phrase_verdict(
    answer: str, toward: re.Pattern[str] | None, away: re.Pattern[str] | None, floor: float
) -> Verdict:
    if text_coherence(answer) < floor:
        return NEITHER
    text = _normal(answer)
    found_toward = toward is not None and bool(toward.search(text))
    found_away = away is not None and bool(away.search(text))
    if toward is None:
        found_toward = not found_away
    if away is None:
        found_away = not found_toward
    if found_toward == found_away:
        return NEITHER
    return Verdict(float(found_toward), float(found_away))


def _normal(text: str) -> str:
    return " ".join(text.translate(_APOSTROPHES).casefold().split())


def _pattern(listed: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(_bounded(p) for p in listed)) if listed else None


def _bounded(phrase: str) -> str:
    """Guard the ends that are word characters; an apostrophe inside a word does not end it."""
    text = _normal(phrase)
    before = r"(?<!\w)(?<!\w')" if text[:1].isalnum() else ""
    after = r"(?!\w|'\w)" if text[-1:].isalnum() else ""
    return before + re.escape(text) + after


def _opens(text: str, word: str) -> bool:
    return bool(word) and re.match(r"\W*?" + _bounded(word), text) is not None


def _strings(options: Options, key: str) -> list[str]:
    listed = options.get(key, ())
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, Sequence) or not all(
        isinstance(item, str) and item.strip() for item in listed
    ):
        raise TrimtabError(
            asked=f"{key}: of the judge 'phrases'",
            found=repr(listed),
            advice="give a list of non-empty strings",
        )
    return [str(item) for item in listed]


def _number(options: Options, key: str, default: float) -> float:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TrimtabError(
            asked=f"{key}: of a judge", found=repr(value), advice="give a number from 0 to 1"
        )
    return float(value)
