"""The judge `pattern`: what a regular expression, a length or a JSON parser can decide."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import check_options
from trimtab.evaluation.judges import NEITHER, Judge, Options, Verdict

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior


class Side(BaseModel):
    """What an answer of one side meets: all that is given.

    Attributes:
        any: one of these regular expressions occurs, in any case.
        none: none of these does.
        json: the answer, or its fenced block, is a JSON object or array.
        min_words: at least so many words.
        max_words: at most so many words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    any: tuple[re.Pattern[str], ...] = ()
    none: tuple[re.Pattern[str], ...] = ()
    json_: bool = False
    min_words: int = 0
    max_words: int | None = None

    def met_by(self, answer: str) -> bool:
        words = len(answer.split())
        return (
            (not self.any or _found(self.any, answer))
            and not _found(self.none, answer)
            and (not self.json_ or _is_json(answer))
            and self.min_words <= words <= (self.max_words or words)
        )


def pattern(behavior: Behavior, options: Options) -> Judge:
    """Judge by rules: toward when the answer meets all of `toward`, away when all of `away`.

    Without a rule for one side, that side is the other's absence; both or neither is neither. An
    empty answer is neither.
    """
    name = f"judge 'pattern' of the behavior {behavior.name!r}"
    check_options(name, options, {"toward", "away"})
    if not options:
        raise TrimtabError(
            f"the {name}",
            "no rules",
            "give toward: and away:, each with any, none, json, min_words or max_words",
        )
    toward, away = (_side(name, side, options.get(side)) for side in ("toward", "away"))

    def verdict(answer: str) -> Verdict:
        shows = toward.met_by(answer) if toward else None
        opposes = away.met_by(answer) if away else not shows
        shows = not opposes if shows is None else shows
        if shows == opposes or not answer.strip():
            return NEITHER
        return Verdict(float(shows), float(opposes))

    return lambda prompts, answers: [verdict(answer) for answer in answers]


def _side(name: str, side: str, given: object) -> Side | None:
    if given is None:
        return None
    try:
        if not isinstance(given, dict):
            raise ValueError("it is not a mapping")
        rules = {("json_" if key == "json" else key): value for key, value in given.items()}
        for key in {"any", "none"} & set(rules):
            rules[key] = tuple(re.compile(text, re.IGNORECASE) for text in rules[key])
        return Side(**rules)
    except (ValidationError, ValueError, TypeError, re.error) as error:
        raise TrimtabError(
            f"{side}: of the {name}",
            str(error).splitlines()[0],
            "give any and none as lists of regular expressions, json as true, min_words and "
            "max_words as numbers",
        ) from error


def _found(patterns: Sequence[re.Pattern[str]], text: str) -> bool:
    return any(pattern.search(text) for pattern in patterns)


def _is_json(answer: str) -> bool:
    fenced = re.search(r"```(?:json)?\s*(.*?)```", answer, re.DOTALL)
    try:
        return isinstance(json.loads(fenced[1] if fenced else answer), dict | list)
    except ValueError:
        return False
