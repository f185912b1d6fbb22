"""What a search has cost."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from trimtab.results.tables import Printable, Table, number


@dataclass(frozen=True)
class Counts(Printable):
    """What a kernel has been asked and what that has cost.

    Attributes:
        asked: Candidates that callers wanted a loss of.
        duplicates: Those equal to another one of their call.
        memo_hits: Those whose exact loss was known.
        scored: Candidates of which anything was computed, in whatever round.
        exact: Candidates scored on every row and token.
        calls: Forward passes of the model; one batch is one call.
        tokens: Token positions fed in them, padding counted.
        draft_calls: Forward passes of the draft model.
        draft_tokens: Token positions fed to it.
        gradients: Gradients; their passes are not among `calls`.
        seconds: Spent in the kernel.
    """

    asked: int = 0
    duplicates: int = 0
    memo_hits: int = 0
    scored: int = 0
    exact: int = 0
    calls: int = 0
    tokens: int = 0
    draft_calls: int = 0
    draft_tokens: int = 0
    gradients: int = 0
    seconds: float = 0.0

    def __sub__(self, earlier: Counts) -> Counts:
        """What has been added since."""
        parts = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return Counts(**parts)

    def table(self) -> Table:
        """One row per count."""
        rows = [
            (f.name.replace("_", " "), number(getattr(self, f.name)))
            for f in fields(self)
            if getattr(self, f.name)
        ]
        return Table("search kernel", ("count", "value"), tuple(rows))


class Tally:
    """Counts that are still running."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.counts = Counts()

    def add(self, **more: float) -> None:
        """Add to some."""
        counts = self.counts
        self.counts = replace(counts, **{k: getattr(counts, k) + v for k, v in more.items()})
