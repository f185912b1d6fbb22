"""Which lever to choose from the rows of a levers table, by the four rules of docs/levers.md.

Nothing is chosen on the test split; its figures are only told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.levers.row import LeverRow
from trimtab.results.intervals import paired_bootstrap
from trimtab.results.tables import number, percent

FLOOR = 0.9


@dataclass(frozen=True)
class Advice:
    """What to choose and why.

    Attributes:
        choice: name of the row; None when no lever is usable.
        free: name of the row to choose where no context may be taken; None where that is the choice,
            or there is none.
        usable: rows that passed rule 1.
        equal: rows as good as the best by rule 2.
        sentence: the advice.
    """

    choice: str | None
    free: str | None
    usable: tuple[str, ...]
    equal: tuple[str, ...]
    sentence: str


def advise(rows: Sequence[LeverRow], behavior: str, budget: float, seed: int = 0) -> Advice:
    """Choose a lever from the measured rows of one table, the unsteered one among them."""
    base = next(row for row in rows if row.kind == "baseline")
    null = next((row for row in rows if row.kind == "null"), None)
    levers = [row for row in rows if row.kind not in ("baseline", "null")]
    usable = [row for row in levers if _usable(row, base, null, seed)]
    if not usable:
        return Advice(None, None, (), (), _nothing(levers, base, behavior, budget))
    best = max(usable, key=lambda row: row.validation.score)
    equal = [row for row in usable if not _beats(best, row, seed)]
    choice = min(equal, key=lambda r: (r.calls, r.context_tokens, not r.baked, r.damage_p95))
    free = _free(choice, equal, usable)
    words = [
        f"{behavior}, {budget:g} nats: use the {choice.name} ({_told(choice)}; unsteered "
        f"{percent(base.score)}{_null(null)})"
    ]
    others = len(usable) - 1
    if choice is best and len(equal) == 1 and others:
        words.append(f"it beats the other {others} usable levers by more than chance")
    elif others:
        words.append(f"none of the other {others} usable levers beats it by more than chance")
    else:
        words.append("no other lever is usable within the budget")
    words.append(f"finding it took {choice.calls} model calls")
    if choice.context_tokens:
        words.append(f"it takes {number(choice.context_tokens, 0)} tokens of every context")
    sentence = ", ".join(words[:1]) + ": " + ", ".join(words[1:])
    if free is not None:
        where = f"as weights ({free.bakeable})" if free.baked else "by its hook"
        sentence += (
            f"; where the context must stay free, use the {free.name} {where}, {_told(free)}"
        )
    elif choice.context_tokens:
        sentence += "; no lever that leaves the context free is usable within the budget"
    elif choice.baked:
        sentence += f"; weights can hold it ({choice.bakeable})"
    return Advice(
        choice.name,
        None if free is None else free.name,
        tuple(row.name for row in usable),
        tuple(row.name for row in equal),
        sentence + ".",
    )


def _usable(row: LeverRow, base: LeverRow, null: LeverRow | None, seed: int) -> bool:
    mine = row.validation
    more = null is None or mine.score > null.validation.score
    return row.within and mine.coherence >= FLOOR and more and _beats(row, base, seed)


def _beats(one: LeverRow, other: LeverRow, seed: int) -> bool:
    """Whether validation scores differ by more than chance."""
    return paired_bootstrap(one.validation.scores, other.validation.scores, seed)[0] > 0


def _free(
    choice: LeverRow, equal: Sequence[LeverRow], usable: Sequence[LeverRow]
) -> LeverRow | None:
    """The lever to take where nothing may stand in the context."""
    if not choice.context_tokens:
        return None
    alike = [row for row in equal if not row.context_tokens]
    if alike:
        return min(alike, key=lambda row: (not row.baked, row.calls, row.damage_p95))
    others = [row for row in usable if not row.context_tokens]
    return max(others, key=lambda row: (row.validation.score, row.baked), default=None)


def _told(row: LeverRow) -> str:
    return (
        f"{percent(row.score)} [{percent(row.low)}, {percent(row.high)}] of {row.n} test answers, "
        f"damage (on-target KL) {number(row.damage_p95, 3)}"
    )


def _null(null: LeverRow | None) -> str:
    return "" if null is None else f", random control {percent(null.score)}"


def _nothing(levers: Sequence[LeverRow], base: LeverRow, behavior: str, budget: float) -> str:
    """Say why nothing is usable, and what came closest."""
    if not levers:
        return f"{behavior}, {budget:g} nats: no lever could be made."
    closest = max(levers, key=lambda row: (row.validation.coherence >= FLOOR, row.validation.score))
    mine = closest.validation
    why = "does not move it by more than chance"
    if not closest.within:
        why = f"does {number(mine.damage_p95)} nats of damage (on-target KL)"
    elif mine.coherence < FLOOR:
        why = f"leaves a coherence of {number(mine.coherence)}"
    return (
        f"{behavior}, {budget:g} nats: use none of these levers; the closest, {closest.name}, {why} "
        f"({percent(mine.score)} of validation answers, unsteered {percent(base.validation.score)}): "
        "allow a larger budget, or find a better direction."
    )
