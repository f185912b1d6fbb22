"""Which prompts run together: little padding, long common beginnings, few calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Prompts of one group at most; beyond it nothing is won.
MOST = 128


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        ids: Its tokens.
        keep: Positions at its end that are read.
        first: Position of the first token that is steered; the number of tokens if none is.
    """

    ids: tuple[int, ...]
    keep: int
    first: int


@dataclass(frozen=True)
class Costs:
    """What a group may be, and what it costs.

    Attributes:
        strengths: Each prompt is run at so many.
        max_tokens: Most tokens of a call, padding counted.
        max_reads: Most positions that a call reads.
        call_tokens: Tokens that take as long as a call by itself.
    """

    strengths: int
    max_tokens: int
    max_reads: int
    call_tokens: int

    def rows(self, width: int, keep: int) -> int:
        """Most rows of a call; at least one."""
        return max(1, min(self.max_tokens // width, self.max_reads // keep))

    def of(self, rows: int, width: int, start: int, common: int) -> int:
        """Tokens that a group is worth.

        Args:
            rows: Prompts.
            width: Tokens of the longest.
            start: Tokens that no strength changes, at the beginning of every row of the batch.
            common: Tokens that all prompts begin with, run once per strength.
        """
        begin = max(start, common)
        once = self.strengths * (begin - start) + (self.call_tokens if begin > start else 0)
        return rows * width + self.strengths * rows * (width - begin) + once + 3 * self.call_tokens


def groups(items: Sequence[Item], costs: Costs) -> list[list[int]]:
    """Split prompts into groups of least cost, as far as neighbors in two orders allow it.

    The orders are by length (no padding) and by tokens (long common beginnings); within an order
    the split is the best there is.

    Returns:
        Places in `items`, each once.
    """
    by_length = sorted(range(len(items)), key=lambda i: (-len(items[i].ids), items[i].ids))
    by_tokens = sorted(range(len(items)), key=lambda i: items[i].ids)
    splits = [_split(items, order, costs) for order in (by_length, by_tokens)]
    return min(splits, key=lambda split: split[0])[1]


def _split(
    items: Sequence[Item], order: Sequence[int], costs: Costs
) -> tuple[int, list[list[int]]]:
    """The cheapest split of an order into runs, and its cost: best[j] is that of the first j."""
    # All prompts of a run begin with what each two neighbors in it begin with.
    shared = [
        0,
        *(_common(items[a].ids, items[b].ids) for a, b in zip(order, order[1:], strict=False)),
    ]
    best, begins = [0], [0]
    ordered = [items[i] for i in order]
    for stop in range(1, len(order) + 1):
        options = [
            (best[begin] + cost, begin) for begin, cost in _ending_at(stop, ordered, shared, costs)
        ]
        cost, begin = min(options)
        best.append(cost)
        begins.append(begin)
    found: list[list[int]] = []
    stop = len(order)
    while stop:
        found.append(list(order[begins[stop] : stop]))
        stop = begins[stop]
    return best[-1], found[::-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _ending_at(
    stop: int, ordered: Sequence[Item], shared: Sequence[int], costs: Costs
) -> Iterator[tuple[int, int]]:
    """Every run that ends before `stop`: where it begins, and its cost."""
    width = keep = lead = 0
    common = len(ordered[stop - 1].ids)
    for begin in range(stop - 1, max(0, stop - MOST) - 1, -1):
        item, rows = ordered[begin], stop - begin
        # Columns are counted from the end, where all rows end together.
        width, keep = max(width, len(item.ids)), max(keep, item.keep)
        lead = max(lead, len(item.ids) - item.first)
        if rows > 1:
            common = min(common, shared[begin + 1])
            if rows * costs.strengths > costs.rows(width, keep):
                return
        unread = width - keep
        once = min(common, unread) if rows > 1 else 0
        yield begin, costs.of(rows, width, min(width - lead, unread), once)
