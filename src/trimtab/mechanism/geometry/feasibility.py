"""Feasibility: one push for all prompts, the real content of "the behavior is low rank".

To first order one delta at a layer moves prompt i from b_i to b_i + g_i . delta. The shortest delta
that crosses zero on every prompt (program.py: exact, or a certificate that there is none) lies
between two lengths: what the hardest prompt needs alone, reached where all gradients are parallel,
and what gradients of the same lengths in random directions need, the null. More dimensions than
prompts make almost everything feasible, so the length is the answer, not the yes.

Linear, so the delta is then really pushed, at growing multiples, on the train prompts that it comes
from and on held-out ones, beside the mean gradient, the steering vector and a random direction of
the same length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.margins.census import Share
from trimtab.margins.close import SIGNS, Pusher, pusher
from trimtab.margins.radius import Gradients
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import depth_name, direction_at
from trimtab.mechanism.geometry.program import largest_share, smallest_norm
from trimtab.results.tables import Printable, Table, number

MARGIN = 0.01  # nats beyond zero: the gap is to cross it, not to touch it
RADII = (0.05, 0.1, 0.2, 0.4, 0.8)  # over |h|
FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the linear length
NULLS = 10


@dataclass(frozen=True)
class ShareWithin:
    """The largest share of prompts that one push of bounded length can move, to first order.

    Attributes:
        radius: the length over |h|.
        count: prompts that a push found satisfies.
        bound: no push that short satisfies more.
        n: prompts.
    """

    radius: float
    count: int
    bound: int
    n: int

    @property
    def cell(self) -> str:
        """The two shares, for a table."""
        if self.count == self.bound:
            return number(self.count / self.n)
        return f"{number(self.count / self.n)}..{number(self.bound / self.n)}"


@dataclass(frozen=True)
class Pushed:
    """One direction really pushed.

    Attributes:
        direction: `program`, `mean gradient`, `vector` or `random`.
        factor: length over that of the shortest linear push.
        train: share of train prompts whose gap crosses zero.
        test: share of held-out prompts.
        test_kl: median KL(unsteered, pushed) of the held-out prompts' first answer token, nats.
    """

    direction: str
    factor: float
    train: Share
    test: Share
    test_kl: float


@dataclass(frozen=True)
class FeasibilityRow:
    """One side at one site.

    Attributes:
        side: `away` prompts, pushed up past 0, or `toward` prompts, pushed down.
        site: whose last position is pushed.
        n: train prompts.
        feasible: whether one delta crosses zero on all of them, to first order.
        norm: length of the shortest over the median |h|; infinite where there is none.
        alone: what the hardest prompt needs by itself, likewise.
        null: mean of `norm` for random gradients of the same lengths, with its range
            `null_low` to `null_high`; infinite where some are infeasible.
        binding: prompts that hold the shortest push back.
        within: largest shares by length, to first order.
        works: smallest multiple tried at which the push really crosses zero on every train prompt;
            infinite for none.
        pushed: what real pushes do at 1 and at `works` (or the largest multiple tried).
    """

    side: str
    site: str
    n: int
    feasible: bool
    norm: float
    alone: float
    null: float
    null_low: float
    null_high: float
    binding: int
    within: tuple[ShareWithin, ...]
    works: float
    pushed: tuple[Pushed, ...]


@dataclass(frozen=True)
class Feasibility(Printable):
    """One push for all prompts, by side.

    Attributes:
        margin: nats beyond zero that were asked for.
        held_out: side to its number of held-out prompts.
        rows: one per side.
    """

    margin: float
    held_out: dict[str, int]
    rows: tuple[FeasibilityRow, ...]

    def table(self) -> Table:
        """Return one line per side."""
        rows = tuple(
            (
                row.side,
                str(row.n),
                "yes" if row.feasible else "no",
                number(row.norm, 3),
                number(row.alone, 3),
                f"{number(row.null, 3)} [{number(row.null_low, 3)}, {number(row.null_high, 3)}]",
                str(row.binding),
                *(one.cell for one in row.within),
                number(row.works),
            )
            for row in self.rows
        )
        columns = ("prompts", "n", "feasible", "norm / |h|", "hardest alone", "random", "binding")
        columns += (*(f"share at {radius:g}" for radius in RADII), "really, times")
        notes = (
            f"{self.rows[0].site}, last position; to first order, train prompts; one push delta with "
            f"b_i + g_i . delta beyond {self.margin:g} nats for all; lengths over the median |h|",
            "random control: gradients of the same lengths in random directions; share at r: found..bound",
        )
        return Table("One push for all prompts", columns, rows, notes)

    def pushed_table(self) -> Table:
        """Return one line per side, direction and multiple, really pushed."""
        rows = tuple(
            (
                row.side,
                one.direction,
                number(one.factor),
                one.train.cell,
                one.test.cell,
                number(one.test_kl, 3),
            )
            for row in self.rows
            for one in row.pushed
        )
        columns = ("prompts", "direction", "times", "train crosses 0", "held-out", "KL, nats")
        note = "the same length for every direction; times: of the shortest linear push"
        return Table("The push, really made", columns, rows, (note,))

    def tables(self) -> tuple[Table, ...]:
        """Return both tables."""
        return self.table(), self.pushed_table()


def feasibility(
    case: Case, layer: int, max_prompts: tuple[int, int], gradients: Mapping[str, Gradients]
) -> Feasibility:
    """Find the shortest push that moves every train prompt at once, and push it for real.

    The last prompt position is pushed after a layer; the case's vector is looked at beside the
    push, at the same length. `gradients` are those of the train prompts' gaps, by side.
    """
    lm, rows, held_out = case.lm, [], {}
    for side, up in (("away", 1), ("toward", -1)):
        assert SIGNS[side] == -up  # the gap is pushed against its side's sign
        prompts = [
            [lm.encode(example.prompt) for example in getattr(part, side)[:most]]
            for part, most in zip((case.splits.train, case.splits.test), max_prompts, strict=True)
        ]
        held_out[side] = len(prompts[1])
        pushers = [pusher(lm, case.readout, some, layer) for some in prompts]
        own = direction_at(case.vector, layer + 1)
        own = None if own is None else up * own
        rows.append(_row(side, up, layer, gradients[side], pushers, own, case.seed))
    return Feasibility(MARGIN, held_out, tuple(rows))


def null_norms(b: np.ndarray, g: np.ndarray, margin: float, seed: int) -> list[float]:
    """Return the shortest norms for gradients of the same lengths in random directions."""
    generator = np.random.default_rng(seed)
    length = np.linalg.norm(g, axis=1, keepdims=True)
    norms = []
    for _ in range(NULLS):
        drawn = generator.normal(size=g.shape)
        drawn *= length / np.linalg.norm(drawn, axis=1, keepdims=True)
        norms.append(smallest_norm(b, drawn, margin).norm)
    return norms


def _row(
    side: str,
    up: int,
    layer: int,
    gradients: Gradients,
    pushers: Sequence[Pusher],
    own: Tensor | None,
    seed: int,
) -> FeasibilityRow:
    b, g = up * gradients.gap.numpy(), up * gradients.grad[:, layer].double().numpy()
    size = float(gradients.norm[:, layer].median())
    shortest = smallest_norm(b, g, MARGIN)
    norms = null_norms(b, g, MARGIN, seed)
    within = []
    for radius in RADII:
        share = largest_share(b, g, radius * size, MARGIN)
        within.append(ShareWithin(radius, share.count, share.bound, share.n))
    works, pushed = math.inf, ()
    if shortest.delta is not None and shortest.norm > 0:
        delta = torch.from_numpy(shortest.delta)
        # The smallest multiple tried that crosses zero on every prompt.
        crosses = (f for f in FACTORS if bool(_crossed(pushers[0], f * delta, up)[0].all()))
        works = next(crosses, math.inf)
        mean = torch.from_numpy(g.mean(0))
        drawn = torch.randn(len(delta), generator=torch.Generator().manual_seed(seed))
        directions = {"program": delta, "mean gradient": mean, "vector": own, "random": drawn}
        factors = sorted({1.0, works if math.isfinite(works) else FACTORS[-1]})
        pushed = tuple(
            _pushed(name, direction.double(), factor, shortest.norm, pushers, up)
            for factor in factors
            for name, direction in directions.items()
            if direction is not None
        )
    return FeasibilityRow(
        side=side,
        site=depth_name(layer + 1),
        n=len(b),
        feasible=shortest.delta is not None,
        norm=shortest.norm / size,
        alone=shortest.alone / size,
        null=float(np.mean(norms)) / size,
        null_low=min(norms) / size,
        null_high=max(norms) / size,
        binding=int((shortest.weights > 1e-6).sum()),
        within=tuple(within),
        works=works,
        pushed=pushed,
    )


def _pushed(
    name: str, direction: Tensor, factor: float, norm: float, pushers: Sequence[Pusher], up: int
) -> Pushed:
    delta = direction / direction.norm().clamp_min(1e-300) * (factor * norm)
    (train, _), (test, kl) = (_crossed(one, delta, up) for one in pushers)
    shares = [Share.of(int(found.sum()), len(found)) for found in (train, test)]
    return Pushed(name, factor, shares[0], shares[1], float(kl.median()))


def _crossed(pushes: Pusher, delta: Tensor, up: int) -> tuple[Tensor, Tensor]:
    n = len(pushes.log_p)
    gap, kl = pushes.push(torch.arange(n), delta.float().expand(n, -1))
    return up * gap > 0, kl
