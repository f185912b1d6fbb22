"""Does one push move all prompts at once? Linear constraints, one Euclidean norm, bounds for both.

Prompt i has the gap b_i and the gradient g_i; to first order one delta moves it to b_i + g_i . delta.

- `smallest_norm`: the shortest delta with b + G delta >= margin. Least-distance programming, exact,
  as one non-negative least-squares problem (Lawson and Hanson 1974, chapter 23). Where there is no
  such delta, its residual is a certificate: weights u >= 0 with G^T u = 0 and u . (margin - b) > 0.
- `largest_share`: how many prompts one delta of norm <= r can satisfy. Exact counting is a
  combinatorial problem; a linear program (scipy, HiGHS) with the ball replaced by a polytope
  around it bounds the count from above; a delta inside the ball, from the program or from dropping
  one prompt after another, is counted and bounds it from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog, nnls

Array = np.ndarray

# A push a million times as long as the hardest prompt alone needs is called none.
FARTHEST = 1e6
CUTS = 12  # tangents to the ball that are added
ROUNDS = 3  # of reweighting towards fewer, larger violations
INSIDE = 1e-9  # of what a solver returns


@dataclass(frozen=True, eq=False)
class SmallestNorm:
    """The shortest push that satisfies every prompt.

    Attributes:
        delta: it, float64 `[d]`; None where there is none, `norm` is infinite then.
        weights: of the prompts that hold it back, summing to 1: their gradients' weighted sum is
            along delta, and zero where there is none (the certificate).
        alone: length that the hardest prompt would need by itself; no delta can be shorter.
    """

    delta: Array | None
    norm: float
    weights: Array
    alone: float


@dataclass(frozen=True, eq=False)
class LargestShare:
    """A push of bounded norm, how many of n prompts it satisfies, and that none satisfies more."""

    delta: Array
    count: int
    bound: int
    n: int


def smallest_norm(b: Array, g: Array, margin: float = 0.0) -> SmallestNorm:
    """Return the shortest delta with b + g @ delta >= margin, for gaps `[n]` and gradients `[n, d]`."""
    size = np.linalg.norm(g, axis=1)
    wanted = margin - b
    if (wanted <= 0).all():
        return SmallestNorm(np.zeros(g.shape[1]), 0.0, np.zeros(len(b)), 0.0)
    stuck = (size == 0) & (wanted > 0)
    if stuck.any():
        return SmallestNorm(None, math.inf, stuck / stuck.sum(), math.inf)
    # A prompt without a gradient that is satisfied stays so: it constrains nothing.
    kept = size > 0
    # Unit rows, and lengths in units of what the hardest prompt needs.
    need = wanted[kept] / size[kept]
    alone = float(need.max())
    rows, heights = g[kept] / size[kept, None], need / alone
    system = np.vstack([rows.T, heights[None]])
    target = np.zeros(len(system))
    target[-1] = 1.0
    u, residual = nnls(system, target, maxiter=100 * len(b) + 1000)
    weights = np.zeros(len(b))
    weights[kept] = u / size[kept]
    weights /= weights.sum()
    # |residual|^2 = 1 / (1 + |x|^2) for the solution x.
    if residual < 1 / FARTHEST:
        return SmallestNorm(None, math.inf, weights, alone)
    rest = target - system @ u
    x = -(system[:-1] @ u) / -rest[-1]
    return SmallestNorm(x * alone, float(np.linalg.norm(x) * alone), weights, alone)


def largest_share(b: Array, g: Array, radius: float, margin: float = 0.0) -> LargestShare:
    """Bound the number of prompts with b + g @ delta >= margin for one delta of norm <= radius.

    With a prompt's slack s_i from 0 (satisfied) to 1, b_i + g_i . delta >= margin - M_i s_i and M_i
    the largest violation inside the ball, n - sum s is at least the count of any delta: its minimum
    over a polytope around the ball, rounded, is the bound. Tangents are added where the program
    leaves the ball; the points it visits, pulled back into the ball, are the candidates.
    """
    n, size = len(b), np.linalg.norm(g, axis=1)
    # Only the span of the gradients matters.
    _, s, basis = np.linalg.svd(g, full_matrices=False)
    basis = basis[s > 1e-9 * max(s.max(initial=0.0), 1e-300)]
    rows = radius * g @ basis.T
    violation = np.maximum(margin - b + radius * size, 0.0)
    never = b + radius * size < margin
    best, count = np.zeros(g.shape[1]), int((b >= margin).sum())

    def look(z: Array) -> None:
        nonlocal best, count
        inside = z / max(1.0, float(np.linalg.norm(z)))
        satisfied = int((b + rows @ inside >= margin - INSIDE).sum())
        if satisfied > count:
            best, count = radius * inside @ basis, satisfied

    kept = _dropped(b, g, radius, margin, never)
    if len(kept) == n:
        nearest = smallest_norm(b, g, margin).delta
        assert nearest is not None  # it has just been found
        return LargestShare(nearest, n, n, n)
    directions = [g[b < margin].sum(0), g.sum(0)]
    if len(kept):
        shortest = smallest_norm(b[kept], g[kept], margin).delta
        assert shortest is not None
        look(shortest @ basis.T / radius)
        directions.append(shortest)
    for direction in directions:
        if np.linalg.norm(direction) > 0:
            look(direction @ basis.T / np.linalg.norm(direction))
    program = _Program(rows, b - margin, violation, never)
    bound = min(n - int(never.sum()), program.solve(np.ones(n), look))
    weights = np.ones(n)
    for _ in range(ROUNDS):
        weights = 1 / (program.slack + 0.05)
        program.solve(weights, look, cuts=2)
    # Not every prompt: the exact shortest push is longer than that.
    return LargestShare(best, count, max(count, min(bound, n - 1)), n)


def _dropped(b: Array, g: Array, radius: float, margin: float, never: Array) -> Array:
    """Prompts that are left when whoever holds the shortest push back most goes, until it fits."""
    kept = np.flatnonzero(~never)
    while len(kept):
        found = smallest_norm(b[kept], g[kept], margin)
        if found.norm <= radius:
            break
        kept = np.delete(kept, int((found.weights * np.linalg.norm(g[kept], axis=1)).argmax()))
    return kept


class _Program:
    """The linear program over z (|z| <= 1, by tangents) and slacks."""

    def __init__(self, rows: Array, height: Array, violation: Array, never: Array) -> None:
        self.n, self.k = rows.shape
        self.constraints = np.hstack([-rows, -np.diag(violation)])
        self.limits = height
        low = np.where(never, 1.0, 0.0)
        self.bounds = [(-1.0, 1.0)] * self.k + [(float(x), 1.0) for x in low]
        self.slack = np.ones(self.n)

    def solve(self, weights: Array, look: Callable[[Array], None], cuts: int = CUTS) -> int:
        """Minimize the weighted slacks, cut by cut; with equal weights, the bound on the count."""
        bound = self.n
        cost = np.concatenate([np.zeros(self.k), weights])
        for _ in range(cuts):
            found = linprog(cost, self.constraints, self.limits, bounds=self.bounds, method="highs")
            if not found.success:  # a solver that gives up has shown nothing: the last bound stands
                break
            z, self.slack = found.x[: self.k], found.x[self.k :]
            if (weights == 1).all():
                bound = min(bound, self.n - math.ceil(float(self.slack.sum()) - 1e-6))
            look(z)
            length = float(np.linalg.norm(z))
            if length <= 1 + 1e-3:
                break
            cut = np.concatenate([z / length, np.zeros(self.n)])
            self.constraints = np.vstack([self.constraints, cut])
            self.limits = np.append(self.limits, 1.0)
        return bound
