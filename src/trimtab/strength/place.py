"""Putting a lever at the largest strength that keeps a budget of damage.

Damage is measured, never predicted (`trimtab.strength.core.largest_within`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.evaluation.divergence import Reference, summarize
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
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
    reference: Reference,
    lever: VectorSteering | WeightSteering | Together,
    budget: float,
    *,
    first: float | None = None,
    largest: float | None = None,
    sign: int = 1,
    seed: int = 0,
) -> Placed:
    """Find the largest strength, of one sign, whose p95 damage along a reference keeps the budget.

    Args:
        reference: prompts with their unsteered answers.
        lever: put at one strength after another; what no strength of a vector changes is read once.
        budget: nats per token.
        first: the magnitude tried first; by default that of the lever.
        largest: the magnitude that is never passed; by default, of a vector, `longest`.
        sign: of the strengths.
        seed: of the damage's intervals.
    """
    if largest is None:
        largest = longest(lever) if isinstance(lever, VectorSteering) else math.inf
    known: dict[float, float] = {}

    def damage(magnitudes: Sequence[float]) -> list[float]:
        strengths = [sign * m for m in magnitudes]
        if isinstance(lever, VectorSteering):
            read = reference.kl_many(lever, strengths)
        else:
            read = [reference.kl(lever.at(m)) for m in strengths]
        found = [summarize(tokens, seed).p95 for tokens in read]
        known.update(zip(magnitudes, found, strict=True))
        return found

    low, high = largest_within(
        damage, budget, first=first or abs(lever.strength) or 1.0, largest=largest
    )
    tried = tuple((sign * m, known[m]) for m in sorted(known))
    by = "budget" if math.isfinite(high) else "range"
    return Placed(sign * low, known.get(low, 0.0), by, tried)


def longest(vector: VectorSteering) -> float:
    """Return the m at which a vector is twice as long as the stream; 64 m without known norms."""
    known = [
        PUSHES * vector.norms[layer] / abs(vector.scales[layer])
        for layer in vector.layers
        if layer in vector.norms and vector.scales[layer]
    ]
    return min(known) if known else 64 * (abs(vector.strength) or 1.0)
