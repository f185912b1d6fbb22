"""Which tokens of a step are steered: a token's weight depends on its request and its phase alone.

A token comes before the last token of its prompt, is that token, or was generated; every scope of
`SCOPES` is a set of these three phases. So a step needs one small table per request, `[3, vectors]`,
and positions that are absolute: a prompt in chunks, or taken up again, is steered as if whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# scope -> whether it covers (a token before the prompt's last, the prompt's last, a generated one).
SCOPES: dict[str, tuple[bool, bool, bool]] = {
    "all": (True, True, True),
    "prompt": (True, True, False),
    "generated": (False, False, True),
    "last": (False, True, True),
}
PHASES = 3

Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Term:
    """One vector of a request.

    Attributes:
        column: Of the vector, see `registry.Entry`.
        strength: The multiplier m.
        scope: One of `SCOPES`.
        digest: Of the vector.
    """

    column: int
    strength: float
    scope: str
    digest: str


def weights(terms: Sequence[Term], vectors: int) -> Floats:
    """The strength of every vector in every phase of one request, `[3, vectors]`; terms add up."""
    table = np.zeros((PHASES, vectors), dtype=np.float32)
    for term in terms:
        table[np.array(SCOPES[term.scope]), term.column] += term.strength
    return table


def places(
    computed: npt.NDArray[np.integer], scheduled: npt.NDArray[np.integer]
) -> tuple[Whole, Whole]:
    """Say for each token of a step, `[tokens]`, which request it is of, and its position there.

    `computed` counts each request's tokens of earlier steps, `scheduled` those of this one.
    """
    rows = np.repeat(np.arange(len(scheduled)), scheduled)
    starts = np.cumsum(scheduled) - scheduled
    return rows, np.arange(len(rows)) - starts[rows] + computed[rows]


def phases(positions: Whole, prompt_lengths: npt.NDArray[np.integer]) -> Whole:
    """0 before the prompt's last token, 1 at it, 2 after it; `[tokens]` all."""
    return (positions >= prompt_lengths - 1).astype(np.int64) + (positions >= prompt_lengths)


def covered(scope: str, start: int, stop: int, prompt_length: int) -> tuple[int, int]:
    """The part of positions [start, stop) that a scope covers, as [first, last); empty if equal."""
    before, at, behind = SCOPES[scope]
    first = 0 if before else prompt_length - 1 if at else prompt_length
    last = stop if behind else prompt_length
    low, high = max(start, first), min(stop, last)
    return (low, high) if low < high else (start, start)
