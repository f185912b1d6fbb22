"""Splits a behavior so that what selects, what trains and what scores never share a prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from trimtab.errors import TrimtabError

EXAMPLE_LISTS = ("toward", "away", "neutral", "requests")
NAMES = ("train", "validation", "test")
SIDES = ("toward", "away")
Lists: TypeAlias = Mapping[str, Sequence[str]]
_Member = tuple[str, int]  # list name and index


def split(
    name: str,
    lists: Lists,
    paired: bool,
    seed: int,
    fractions: Sequence[float],
) -> list[dict[str, list[int]]]:
    """Return the indices of train, validation and test; see `Behavior.split`.

    `lists` holds a key for each example of each list; equal keys stay together.
    """
    shares = [float(f) for f in fractions]
    if len(shares) != 3 or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise TrimtabError(
            f"a split by the fractions {tuple(fractions)}",
            "shares that are not three positive numbers summing to 1",
            "use e.g. (0.5, 0.25, 0.25)",
        )
    groups = _groups(lists, paired)
    for side in SIDES:
        distinct = sum(any(name == side for name, _ in group) for group in groups)
        if distinct < 3:
            raise TrimtabError(
                f"a split of the behavior {name!r} into {', '.join(NAMES)}",
                f"{distinct} different prompt{'s' * (distinct != 1)} on the {side} side"
                + (" (a pair, or examples of the same prompt, count as one)"),
                f"give at least 3 on each side (toward has {len(lists['toward'])} examples, away "
                f"{len(lists['away'])}), or use all of it for finding with split=None",
            )
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)  # stable: large groups first, while there is room for them
    placed = _place(groups, shares)
    parts = []
    for chosen in placed:
        kept = {name: sorted(i for n, i in chosen if n == name) for name in EXAMPLE_LISTS}
        if not all(kept[side] for side in SIDES):
            raise TrimtabError(
                f"a split of the behavior {name!r} into {', '.join(NAMES)}",
                "prompts repeated so often that a split has one side only",
                "give more different prompts on each side",
            )
        parts.append(kept)
    return parts


def _groups(lists: Lists, paired: bool) -> list[list[_Member]]:
    """Return the sets of examples that may not be separated, in order of their first member."""
    parent: dict[_Member, _Member] = {}

    def root(member: _Member) -> _Member:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    first_with: dict[str, _Member] = {}
    for name in EXAMPLE_LISTS:
        for i, key in enumerate(lists[name]):
            parent[name, i] = (name, i)
            parent[name, i] = root(first_with.setdefault(key, (name, i)))
            if paired and name == "away":
                parent[root((name, i))] = root(("toward", i))
    groups: dict[_Member, list[_Member]] = {}
    for member in parent:
        groups.setdefault(root(member), []).append(member)
    return list(groups.values())


def _place(groups: Sequence[Sequence[_Member]], shares: Sequence[float]) -> list[list[_Member]]:
    """Give each group to the split that lacks most, and keep the last ones for empty splits."""
    present = {name for group in groups for name, _ in group}
    total = {name: sum(n == name for group in groups for n, _ in group) for name in present}
    left = {name: sum(any(n == name for n, _ in group) for group in groups) for name in present}
    target = [{name: max(1.0, share * total[name]) for name in present} for share in shares]
    placed: list[list[_Member]] = [[], [], []]
    for group in groups:
        counts = {name: sum(n == name for n, _ in group) for name in {n for n, _ in group}}
        allowed = set(range(3))
        for name in sorted(counts, key=EXAMPLE_LISTS.index):
            empty = {s for s in range(3) if all(n != name for n, _ in placed[s])}
            if left[name] <= len(empty) and empty & allowed:
                allowed &= empty
            left[name] -= 1

        def lack(s: int, counts: dict[str, int] = counts) -> float:
            have = {name: sum(n == name for n, _ in placed[s]) for name in counts}
            # As a share of the list's length, so that lists of different lengths count alike.
            return sum((target[s][name] - have[name]) / total[name] for name in counts)

        best = max(sorted(allowed), key=lambda s: (lack(s), -len(placed[s])))
        placed[best].extend(group)
    return placed
