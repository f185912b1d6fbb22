"""The judge `sentiment`: English mood by VADER's lexicon and rules (Hutto and Gilbert, 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, extra
from trimtab.evaluation.judges import Judge, Options, Verdict

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior


def sentiment(behavior: Behavior, options: Options) -> Judge:
    """Judge by VADER's compound score of the answer, from -1 to 1.

    Toward at or above `threshold` (0.5 by default), away at or below its negative, else neither;
    `toward: negative` turns the sides around.
    """
    threshold: Any = options.get("threshold", 0.5)
    side = options.get("toward", "positive")
    unknown = sorted(set(options) - {"threshold", "toward"})
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if unknown or not number or not 0 < threshold < 1 or side not in ("positive", "negative"):
        raise TrimtabError(
            f"the judge 'sentiment' of the behavior {behavior.name!r}",
            f"the options {dict(options)}",
            "give toward: positive or negative, and threshold: between 0 and 1, or nothing",
        )
    analyzer = extra("vaderSentiment.vaderSentiment", "judges").SentimentIntensityAnalyzer()
    sign = 1 if side == "positive" else -1

    def verdict(answer: str) -> Verdict:
        score = sign * analyzer.polarity_scores(answer)["compound"]
        return Verdict(float(score >= threshold), float(score <= -threshold))

    return lambda prompts, answers: [verdict(answer) for answer in answers]
