"""Losses of many slots over many rows, feeding each token that they share as seldom as possible.

    before | slot | after | target
    once   | once per candidate, from where it leaves the common beginning | per candidate and row

After the slot nothing can be shared, because it attends to the slot: those tokens times candidates
times rows are the floor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, takewhile

import torch
from torch import Tensor

from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.passes.fan import CALL_TOKENS, CALL_TOKENS_ELSEWHERE
from trimtab.prompts.scoring.feeding import Feeder, beginning
from trimtab.prompts.scoring.keys import Keys
from trimtab.prompts.scoring.objective import Objective
from trimtab.prompts.scoring.room import Room
from trimtab.prompts.task.rows import PromptRow, Slot


class Passes:
    """The forward passes of one model for a search over the slot of some rows.

    The model's weights and steering stay as they are for this object's life. `cached` says whether
    passes continue from kept keys and values; None until the first losses.
    """

    def __init__(
        self,
        lm: LanguageModel,
        objective: Objective,
        savings: bool,
        room: Room,
        count: Callable[[int], None],
    ) -> None:
        """`count` is called with the token positions of every call."""
        self.objective = objective
        self.room = room
        self.cached: bool | None = None if savings else False
        self._feeder = Feeder(lm, count)
        self._heads: dict[Slot, Keys] = {}
        self._trunk: tuple[tuple[Slot, ...], Slot, Keys] | None = None
        self._call_tokens = CALL_TOKENS.get(lm.device.type, CALL_TOKENS_ELSEWHERE)
        self._logits = int(text_config(lm.model).vocab_size)

    @torch.no_grad()
    def losses(self, slots: Sequence[Slot], rows: Sequence[PromptRow]) -> Tensor:
        """Return the loss of each slot over the rows, float64 `[slots]` on the CPU."""
        result = torch.zeros(len(slots), dtype=torch.float64)
        if slots and self.cached is None:
            self.cached = self._feeder.keys_hold(rows[0].encoded(slots[0]))
        for length in sorted({len(slot) for slot in slots}):
            places = [i for i, slot in enumerate(slots) if len(slot) == length]
            result[places] = self._alike([slots[i] for i in places], rows)
        return result / sum(self.objective.weight(row) for row in rows)

    def _alike(self, slots: list[Slot], rows: Sequence[PromptRow]) -> Tensor:
        """Weighted sums over rows, of slots of one length."""
        totals = torch.zeros(len(slots), dtype=torch.float64)
        places = list(range(len(slots)))
        if not self.cached:
            return totals + self._score(slots, places, rows, None, lambda c, r: 0)
        befores = tuple(dict.fromkeys(row.before for row in rows))
        share = len(befores) == 1 < len(rows)
        trunk = common_trunk(slots)
        parts = self._parts(slots, trunk, 1 if share else len(rows), len(befores))
        depth = max(parts)
        base = self._base(befores, trunk[:depth])
        for at, members in parts.items():
            keys = base and base.without_last(depth - at)
            if share:
                totals += self._shared(slots, members, rows, keys)
            else:
                sources = [befores.index(row.before) for row in rows]
                totals += self._score(slots, members, rows, keys, lambda c, r, s=sources: s[r])
        return totals

    def _shared(
        self, slots: list[Slot], members: list[int], rows: Sequence[PromptRow], base: Keys | None
    ) -> Tensor:
        """Each candidate's keys once, then the rows after them."""
        totals = torch.zeros(len(slots), dtype=torch.float64)
        before = rows[0].before

        def work(part: Sequence[int]) -> Tensor:
            beginnings = [beginning(before + slots[c]) for c in part]
            keys = self._feeder.keys(beginnings, base, [0] * len(part))
            position = {c: i for i, c in enumerate(part)}
            return self._score(slots, part, rows, keys, lambda c, r: position[c])

        for sums in self.room.over(members, work, len(before) + len(slots[0])):
            totals += sums
        return totals

    def _score(
        self,
        slots: Sequence[Slot],
        members: Sequence[int],
        rows: Sequence[PromptRow],
        keys: Keys | None,
        sequence: Callable[[int, int], int],
    ) -> Tensor:
        """Weighted sums over rows; `sequence(slot, row)` says whose keys a pair continues from."""
        totals = torch.zeros(len(slots), dtype=torch.float64)
        first = slots[members[0]]
        fed = [
            len(row.encoded(first).ids) - (keys.lengths[sequence(members[0], r)] if keys else 0)
            for r, row in enumerate(rows)
        ]
        keep = [self.objective.keep(row) for row in rows]

        def work(part: Sequence[tuple[int, int]]) -> Tensor:
            items = [rows[r].encoded(slots[c]) for c, r in part]
            taken = [sequence(c, r) for c, r in part]
            logits = self._feeder.logits(items, keys, taken, max(keep[r] for _, r in part))
            return self.objective.values(logits, [rows[r] for _, r in part]).double().cpu()

        for group in self._rows_of_one_size(fed, len(members)):
            columns = fed[group[0]]
            wanted = max(keep[r] for r in group)
            pairs = [(c, r) for r in group for c in members]
            found = self.room.over(pairs, work, columns, wanted * self._logits)
            for (c, r), value in zip(pairs, chain.from_iterable(found), strict=True):
                totals[c] += self.objective.weight(rows[r]) * value
        return totals

    def _rows_of_one_size(self, fed: Sequence[int], candidates: int) -> list[list[int]]:
        """Rows that share calls, the longest first: shorter ones waste less than a call costs."""
        groups: list[list[int]] = []
        for r in sorted(range(len(fed)), key=lambda r: -fed[r]):
            longest = fed[groups[-1][0]] if groups else 0
            if groups and (longest - fed[r]) * candidates <= self._call_tokens:
                groups[-1].append(r)
            else:
                groups.append([r])
        return groups

    def _parts(
        self, slots: list[Slot], trunk: Slot, times: int, sources: int
    ) -> dict[int, list[int]]:
        """Candidates by the number of first tokens that they take from the trunk, the most first.

        A part whose candidates would save less than a call costs goes with the next one.
        """
        everybody = {0: list(range(len(slots)))}
        if not trunk:
            return everybody
        by_depth: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            by_depth.setdefault(_common(slot, trunk), []).append(i)
        parts: dict[int, list[int]] = {}
        carried: list[int] = []
        depths = sorted(by_depth, reverse=True)
        for depth, lower in zip(depths, [*depths[1:], 0], strict=True):
            carried = carried + by_depth[depth]
            if depth == depths[-1] or len(carried) * times * (depth - lower) > self._call_tokens:
                parts[depth], carried = carried, []
        saved = times * sum(depth * len(members) for depth, members in parts.items())
        return parts if saved > self._call_tokens + sources * max(parts) else everybody

    def _base(self, befores: tuple[Slot, ...], trunk: Slot) -> Keys | None:
        """Keys of every beginning followed by the trunk; None where there are no tokens."""
        keys = self._heads_of(befores)
        if not trunk:
            return keys
        if self._trunk and self._trunk[0] == befores:
            _, old, kept = self._trunk
            held = _common(old, trunk)
            if held:
                keys = kept.without_last(len(old) - held)
            if held == len(trunk):
                return keys
        items = [beginning(before + trunk) for before in befores]
        made = self.room.over(
            range(len(items)),
            lambda part: self._feeder.keys([items[i] for i in part], keys, part),
            max(len(item.ids) for item in items),
        )
        result = Keys.stack(list(made))
        self._trunk = befores, trunk, result
        return result

    def _heads_of(self, befores: tuple[Slot, ...]) -> Keys | None:
        if not all(befores):
            return None
        for before in befores:
            if before not in self._heads:
                self._heads[before] = self._feeder.keys([beginning(before)], None, [0])
        return Keys.stack([self._heads[before] for before in befores])


def common_trunk(slots: Sequence[Slot]) -> Slot:
    """The beginning that most slots share, token by token; it ends where no two continue alike."""
    trunk: list[int] = []
    left = list(slots)
    while left:
        tokens = Counter(slot[len(trunk)] for slot in left if len(slot) > len(trunk))
        token, times = tokens.most_common(1)[0] if tokens else (0, 0)
        if times < 2:
            break
        left = [slot for slot in left if len(slot) > len(trunk) and slot[len(trunk)] == token]
        trunk.append(token)
    return tuple(trunk)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
