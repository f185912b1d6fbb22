"""The one error of Trimtab: what was asked, what was found, what to do next."""

from __future__ import annotations


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
        """Three short lines."""
        return f"{self.asked}\n  found: {self.found}\n  advice: {self.advice}"
