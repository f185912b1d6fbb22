"""The one error of Trimtab: what was asked, what was found, what to do next."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from types import ModuleType


class TrimtabError(Exception):
    """Raised for every request that cannot be met as it was made.

    Attributes:
        asked: What the caller wanted, in the caller's own words where possible.
        found: What was found instead.
        advice: What to do next.
    """

    def __init__(self, asked: str, found: str, advice: str) -> None:
        """Keep the three parts apart, so that a page or a terminal can show them in its own way."""
        # All three go to Exception, so that copying and crossing a process boundary keep them.
        super().__init__(asked, found, advice)
        self.asked = asked
        self.found = found
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.asked}\n  found: {self.found}\n  advice: {self.advice}"


def nearest(given: str, choices: Sequence[str]) -> str:
    """Return the advice for a name that is not there: the closest one, and all of them."""
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    return (
        f"did you mean {close[0]!r}? " if close else ""
    ) + f"choose one of: {', '.join(choices)}"


def extra(module: str, name: str) -> ModuleType:
    """Import the package of an extra, when it is used: nothing needs it before.

    Args:
        module: what is imported.
        name: the extra of Trimtab that brings it.

    Raises:
        TrimtabError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrimtabError(
            asked=f"to use the package {module.partition('.')[0]}",
            found=f"it cannot be imported: {error}",
            advice=f"pip install 'trimtab[{name}]'",
        ) from error
