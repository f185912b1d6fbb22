"""What makes the search kernel cheap, each saving with its own switch, and what a search has cost."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from trimtab.results.tables import Printable, Table, number


@dataclass(frozen=True)
class Tricks:
    """Savings of the search kernel; losses are the same with every one of them off.

    Attributes:
        head_cache: Keep the keys and values of what stands before the slot for the kernel's life.
        share_slot: Feed a candidate's tokens once for all rows that begin alike.
        cut: Take the tokens that a candidate shares with the others' common beginning from one
            pass over that beginning.
        keep_logits: Make logits of the positions that are read only.
        dedupe: Score equal candidates of a call once.
        memo: Remember exact losses, and what a race has estimated, from call to call.
        race: `best` ranks all candidates on few rows and few first target tokens, and scores only
            the best of them in full.
        draft: `best` ranks with a cheaper model first: the one that was given, else the same model
            in bfloat16 where the device multiplies that much faster.
        remember_batch: Go on with the batch size that an out-of-memory error has led to.
    """

    head_cache: bool = True
    share_slot: bool = True
    cut: bool = True
    keep_logits: bool = True
    dedupe: bool = True
    memo: bool = True
    race: bool = True
    draft: bool = True
    remember_batch: bool = True

    @classmethod
    def none(cls) -> Tricks:
        """Every saving off: all candidates, all rows, all tokens, all logits."""
        return cls(**dict.fromkeys((item.name for item in fields(cls)), False))

    def without(self, *names: str) -> Tricks:
        """The same but for some."""
        return replace(self, **dict.fromkeys(names, False))

    @property
    def caches(self) -> bool:
        """Whether any needs keys and values of an earlier pass."""
        return self.head_cache or self.share_slot or self.cut


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
