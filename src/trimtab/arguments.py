"""Arguments that mean the same in every public function and every command."""

from __future__ import annotations

from typing import Literal, TypeAlias

from trimtab.errors import TrimtabError

MAX_PROMPTS = 32  # of each side of a split
MAX_NEW_TOKENS = 40  # of an answer
NULLS = 3  # random directions per vector

Side: TypeAlias = Literal["toward", "away"]
Direction: TypeAlias = Literal["toward", "away", "both"]

_SIGNS = {"toward": (1,), "away": (-1,), "both": (1, -1)}


def signs_of(direction: str) -> tuple[int, ...]:
    """Return +1 for toward, -1 for away, (+1, -1) for both.

    Raises:
        TrimtabError: for another word.
    """
    if direction not in _SIGNS:
        raise _refusal(direction, "toward, away or both")
    return _SIGNS[direction]


def sign_of(direction: str) -> int:
    """Return +1 for toward, -1 for away.

    Raises:
        TrimtabError: for another word; for both, where there is one lever for one direction.
    """
    signs = _SIGNS.get(direction, ())
    if len(signs) != 1:
        raise _refusal(direction, "toward or away")
    return signs[0]


def _refusal(direction: str, known: str) -> TrimtabError:
    return TrimtabError(
        asked=f"the direction {direction!r}", found="no such direction", advice=f"use {known}"
    )
