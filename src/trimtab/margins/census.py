"""The census: how often the likeliest first answer token lies in a readout set at all.

A gap between two sets says little where most answers open with a token of neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.evaluation.readout import ReadoutTokens, token_text
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import clopper_pearson
from trimtab.results.tables import ABSENT, Printable, Table, with_interval

SHOWN = 5  # of the tokens in neither set


@dataclass(frozen=True)
class Share:
    """A count of prompts as a share, with its exact binomial 95 % interval (Clopper-Pearson)."""

    count: int
    share: float
    low: float
    high: float

    @staticmethod
    def of(count: int, n: int) -> Share:
        """Return `count` of `n` prompts."""
        return Share(count, count / n, *clopper_pearson(count, n))

    @property
    def cell(self) -> str:
        """The share with its interval, for a table."""
        return with_interval(self.share, self.low, self.high)


@dataclass(frozen=True)
class CensusSide:
    """One list of prompts.

    Attributes:
        n: prompts.
        toward: first tokens in the toward set.
        away: first tokens in the away set.
        neither: first tokens in none of both.
        others: the most frequent tokens of neither set, (text, prompts).
    """

    n: int
    toward: Share
    away: Share
    neither: Share
    others: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Census(Printable):
    """The census of every list of prompts.

    Attributes:
        sides: list of prompts to its shares.
    """

    sides: dict[str, CensusSide]

    def table(self) -> Table:
        rows = tuple(
            (
                side,
                str(one.n),
                *(share.cell for share in (one.toward, one.away, one.neither)),
                ", ".join(f"{text!r} {count}" for text, count in one.others) or ABSENT,
            )
            for side, one in self.sides.items()
        )
        columns = ("prompts", "n", "toward", "away", "neither", "most frequent of neither")
        return Table("Census of greedy first tokens, shares", columns, rows)


def count_first_tokens(
    lm: LanguageModel, greedy: Mapping[str, Tensor], tokens: ReadoutTokens
) -> Census:
    """Count where greedy first tokens `[n]` of each list of prompts lie."""
    return Census({side: _side(lm, ids.tolist(), tokens) for side, ids in greedy.items()})


def _side(lm: LanguageModel, ids: list[int], tokens: ReadoutTokens) -> CensusSide:
    n = len(ids)
    toward = sum(i in tokens.toward for i in ids)
    away = sum(i in tokens.away for i in ids)
    other = Counter(i for i in ids if i not in tokens.toward and i not in tokens.away)
    return CensusSide(
        n,
        Share.of(toward, n),
        Share.of(away, n),
        Share.of(other.total(), n),
        tuple((token_text(lm, i), count) for i, count in other.most_common(SHOWN)),
    )
