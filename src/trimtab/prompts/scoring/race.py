"""Racing: all candidates on little, the best of them on more, the last few on everything.

Successive halving (Jamieson and Talwalkar 2016) over rows and over first target tokens. What a round
computes is a loss on part of the rows and tokens: good to rank by, never reported.

Rows stand in for each other, tokens do not: a few rows rank nearly as all do, but of one row alone
the first tokens, even half of them, lose the best of 256 candidates two times in three (an eighth
kept) when a search is far on, because what is left to gain then lies in the last ones. So few rows
are not raced on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.prompts.task.rows import PromptRow

# With fewer rows than this a part of them says too little.
_ROWS = 4
# Least target tokens to rank on: with half as many, the best of 64 was lost more than twice as often.
_TELLING = 8
# Tokens of the draft model that take as long as one of the model.
_DRAFT_TOKENS = 2.0


@dataclass(frozen=True)
class Round:
    """One round of a race.

    Attributes:
        places: Which rows candidates are ranked on.
        share: How much of each row's target is read: the first one in so many tokens, eight at
            least.
        draft: Whether the draft model ranks.
        survivors: How many continue.
    """

    places: tuple[int, ...]
    share: int
    draft: bool
    survivors: int = field(compare=False)

    def rows(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """What candidates are ranked on."""
        chosen = [rows[place] for place in self.places]
        return [row.first(max(_TELLING, -(-len(row.target) // self.share))) for row in chosen]


def rounds(
    rows: Sequence[PromptRow], candidates: int, keep: int, draft: bool, turn: int
) -> tuple[Round, ...]:
    """Plan a race, which ends with an exact loss of those that are left.

    First a quarter is chosen on a quarter of the rows (two at least) and half of their tokens, then
    a quarter of those on all rows with half of their tokens. The draft model, where there is one,
    does the ranking; in the second round it reads all tokens and lets an eighth pass. With fewer
    than four rows it does so at once, and one in 32 passes. A round that costs more than it saves is
    left out. `turn` says which rows come first, so that not the same few decide every time.
    """
    everywhere = tuple(range(len(rows)))
    race = len(rows) >= _ROWS
    count = max(2, -(-len(rows) // 4))
    few = tuple(sorted((turn + i * len(rows) // count) % len(rows) for i in range(count)))
    # The ranking of the very best is what estimates get wrong, a draft that read everything less.
    stages = [(few, 2, 4, 4)] if race else []
    if draft:
        stages.append((everywhere, 1, 8 if race else 32, 2))
    elif race:
        stages.append((everywhere, 2, 4, 3))
    found: list[Round] = []
    left = candidates
    for places, share, fraction, least in stages:
        survivors = max(-(-left // fraction), least, keep)
        each = Round(places, share, draft, survivors)
        cost = left * _tokens(each.rows(rows)) / (_DRAFT_TOKENS if draft else 1)
        if cost < (left - survivors) * _tokens(rows):
            found.append(each)
            left = survivors
    return tuple(found)


def _tokens(rows: Sequence[PromptRow]) -> int:
    """What a candidate has to be fed, less its own tokens."""
    return sum(len(row.after) + max(0, len(row.target) - 1) for row in rows)
