"""Putting a lever at the largest strength that keeps a budget of damage.

Damage is measured, never predicted (`trimtab.strength.core.largest_within`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.steering.vector import Switch, VectorSteering
from trimtab.strength.core import largest_within

PUSHES = 2.0  # a vector is never longer than this many norms of the stream


@dataclass(frozen=True)
class Placed:
    """The strength a lever is put at.

    Attributes:
        strength: m; 0 when no strength tried keeps the budget.
        damage_p95: there, on the prompts it was chosen on, nats per token.
        limited_by: `budget`, or `range` where the largest strength that is tried still keeps it.
        tried: (strength, p95 damage) of everything measured.
    """

    strength: float
    damage_p95: float
    limited_by: str
    tried: tuple[tuple[float, float], ...]


def place(
    damage: Callable[[Sequence[float]], Sequence[float]],
    budget: float,
    *,
    first: float = 1.0,
    largest: float = math.inf,
    sign: int = 1,
) -> Placed:
    """Find the largest strength whose damage keeps the budget.

    Args:
        damage: p95 damage at each of some strengths, nats per token.
        budget: nats per token.
        first: the magnitude tried first.
        largest: the magnitude that is never passed.
        sign: of the strengths.

    Raises:
        TrimtabError: a budget or a strength that is not above 0.
    """
    if not (0 < budget < math.inf and 0 < first < math.inf and largest > 0):
        raise TrimtabError(
            asked=f"a strength within {budget} nats, tried from {first} to {largest}",
            found="a number that is not above 0",
            advice="give nats per token such as 0.5 and a strength such as 1",
        )
    known: dict[float, float] = {}

    def look(magnitudes: Sequence[float]) -> list[float]:
        found = list(damage([sign * m for m in magnitudes]))
        known.update(zip(magnitudes, found, strict=True))
        return found

    low, high = largest_within(look, budget, first=first, largest=largest)
    tried = tuple((sign * m, known[m]) for m in sorted(known))
    by = "budget" if math.isfinite(high) else "range"
    return Placed(sign * low, known.get(low, 0.0), by, tried)


def place_vector(
    reference: Reference, vector: VectorSteering, budget: float, sign: int = 1, seed: int = 0
) -> Placed:
    """Place a vector; what no strength changes is read once for several strengths."""

    def damage(strengths: Sequence[float]) -> list[float]:
        return [summarize(tokens, seed).p95 for tokens in reference.kl_many(vector, strengths)]

    first = abs(vector.strength) or 1.0
    return place(damage, budget, first=first, largest=longest(vector), sign=sign)


def place_lever(
    reference: Reference,
    at: Callable[[float], Switch],
    budget: float,
    *,
    first: float = 1.0,
    largest: float = math.inf,
    sign: int = 1,
    seed: int = 0,
) -> Placed:
    """Place any lever with a strength, one measurement a strength."""

    def damage(strengths: Sequence[float]) -> list[float]:
        return [summarize(reference.kl(at(m)), seed).p95 for m in strengths]

    return place(damage, budget, first=first, largest=largest, sign=sign)


def longest(vector: VectorSteering) -> float:
    """Return the m at which a vector is twice as long as the stream; 64 m without known norms."""
    known = [
        PUSHES * vector.norms[layer] / abs(vector.scales[layer])
        for layer in vector.layers
        if layer in vector.norms and vector.scales[layer]
    ]
    return min(known) if known else 64 * (abs(vector.strength) or 1.0)
