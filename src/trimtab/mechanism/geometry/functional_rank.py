"""Functional rank: how many dimensions of the stream it takes to move the gap on held-out prompts.

After a layer, at the last prompt position, with P_k the projection on the k leading right singular
vectors (not centered) of TRAIN prompts and held-out pairs (toward_i, away_i):

    added      away prompts:   h + P_k (h_toward,i - h_away,i)       full: the other side's state
    ablated    toward prompts: h + P_k (mean away - h)               full: the mean of train away prompts

The functional rank is the smallest k tried whose mean change of the gap reaches 90 % of the full one.
Subspaces: of the differences, of the gap's gradients, random ones of the same k (the null); the
steering vector's own direction is a subspace of k = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.margins.close import Pusher, pusher
from trimtab.margins.radius import Gradients
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import depth_name, direction_at
from trimtab.mechanism.geometry.rank import leading
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import RESAMPLES
from trimtab.results.quantiles import Estimate
from trimtab.results.tables import Printable, Table, number, with_interval

REACHED = 0.9
BASES = ("differences", "gradients", "random")


@dataclass(frozen=True)
class RankPoint:
    """One subspace: its dimension, and its mean change of the gap over the full one's."""

    k: int
    share: Estimate


@dataclass(frozen=True)
class FunctionalRow:
    """One way and one kind of subspace.

    Attributes:
        mode: `added` or `ablated`.
        basis: `differences`, `gradients` or `random`.
        full: change of the gap by the whole difference, nats.
        vector: share of it that the vector's direction alone reaches.
        curve: share of it by dimension.
        k: smallest dimension tried that reaches 90 %; infinite where none does, nan where the full
            change is not told from 0 in the direction expected.
        low: 2.5th, `high` 97.5th percentile of k over resampled prompts.
    """

    mode: str
    basis: str
    full: Estimate
    vector: Estimate
    curve: tuple[RankPoint, ...]
    k: float
    low: float
    high: float


@dataclass(frozen=True)
class FunctionalRank(Printable):
    """Functional ranks at one site.

    Attributes:
        site: whose last position is changed.
        trained: pairs that the subspaces come from.
        n: held-out pairs.
        rows: one per way and kind of subspace.
    """

    site: str
    trained: int
    n: int
    rows: tuple[FunctionalRow, ...]

    def row(self, mode: str, basis: str) -> FunctionalRow:
        """Return one row."""
        return next(one for one in self.rows if (one.mode, one.basis) == (mode, basis))

    def table(self) -> Table:
        """Return one line per way and kind of subspace."""
        ks = [point.k for point in self.rows[0].curve]
        rows = tuple(
            (
                row.mode,
                row.basis,
                row.full.cell,
                with_interval(row.k, row.low, row.high, 0),
                *(number(point.share.mean) for point in row.curve),
                number(row.vector.mean),
            )
            for row in self.rows
        )
        columns = ("", "subspace", "full change, nats", "rank", *(f"k={k}" for k in ks), "vector")
        notes = (
            f"{self.site}, last position; share of the full change of the gap by k; subspaces from "
            f"{self.trained} train pairs, {self.n} held-out pairs",
            "rank: smallest k tried that reaches 90 %, with its interval over prompts; random: its control; a "
            "subspace has at most as many dimensions as its train rows",
        )
        return Table("Functional rank", columns, rows, notes)


def functional_rank(
    case: Case,
    layer: int,
    pairs: tuple[int, int],
    ks: Sequence[int],
    gradients: Mapping[str, Gradients],
) -> FunctionalRank:
    """Find the smallest subspaces that carry the behavior at one layer, of the dimensions `ks`.

    At most so many `pairs` of the train split, which give the subspaces, and of the test split are
    read; sides that are not paired are put together in order. `gradients` are those of the train
    prompts' gaps, by side.
    """
    lm, train, test = case.lm, case.splits.train, case.splits.test
    n = min(len(test.toward), len(test.away), pairs[1])
    if n < 2:
        raise TrimtabError(
            asked=f"a functional rank from {n} held-out pairs",
            found="fewer than two pairs",
            advice="give more prompts",
        )
    trained = min(len(train.toward), len(train.away), pairs[0])
    learned = {side: _states(lm, train, side, pairs[0], layer) for side in ("toward", "away")}
    generator = torch.Generator().manual_seed(case.seed)
    drawn = torch.randn(lm.d_model, lm.d_model, generator=generator, dtype=torch.float64)
    # Orthonormal rows, strongest first.
    bases = {
        "differences": leading(learned["toward"][:trained] - learned["away"][:trained]),
        "gradients": leading(torch.cat([gradients[s].grad[:, layer] for s in ("toward", "away")])),
        "random": torch.linalg.qr(drawn).Q.T,
    }
    toward, away = (_states(lm, test, side, n, layer) for side in ("toward", "away"))
    own = direction_at(case.vector, layer + 1)
    rows = []
    for mode, side, sign, steps in (
        ("added", "away", 1, toward - away),
        ("ablated", "toward", -1, learned["away"].mean(0) - toward),
    ):
        encoded = [lm.encode(example.prompt) for example in getattr(test, side)[:n]]
        pushes = pusher(lm, case.readout, encoded, layer)
        plain = _gaps(pushes, 0 * steps)

        def change(moved: Tensor, pushes=pushes, plain=plain, sign=sign) -> Tensor:
            return sign * (_gaps(pushes, moved) - plain)

        alone = None if own is None else change(_on(steps, own.double()[None]))
        full = change(steps)
        for basis in BASES:
            changes = torch.stack([change(_on(steps, bases[basis][:k])) for k in ks])
            rows.append(_row(mode, basis, ks, full, changes, alone, case.seed))
    return FunctionalRank(depth_name(layer + 1), trained, n, tuple(rows))


def smallest(ks: Sequence[int], shares: Tensor) -> float:
    """Return the smallest k whose share `[ks]` reaches the mark; infinite for none."""
    reached = (shares >= REACHED).nonzero()
    return float(ks[int(reached[0])]) if len(reached) else math.inf


def _row(
    mode: str,
    basis: str,
    ks: Sequence[int],
    full: Tensor,
    changes: Tensor,
    vector_change: Tensor | None,
    seed: int,
) -> FunctionalRow:
    """Shares of the full change, ratios of means over prompts, whole prompts resampled."""
    n = len(full)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, n, (RESAMPLES, n), generator=generator)
    below = full[picks].mean(1)

    def ratio(change: Tensor) -> Estimate:
        resampled = change[picks].mean(1) / below
        low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Estimate(float(change.mean() / full.mean()), float(low), float(high))

    whole = Estimate.of(full, seed)
    curve = tuple(RankPoint(k, ratio(change)) for k, change in zip(ks, changes, strict=True))
    nothing = Estimate(*(math.nan,) * 3)
    alone = nothing if vector_change is None else ratio(vector_change)
    if not whole.low > 0:
        return FunctionalRow(mode, basis, whole, alone, curve, *(math.nan,) * 3)
    shares = torch.stack([change[picks].mean(1) / below for change in changes])
    found = sorted(smallest(ks, column) for column in shares.T)
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
    k = smallest(ks, changes.mean(1) / full.mean())
    return FunctionalRow(mode, basis, whole, alone, curve, k, low, high)


def _states(lm: LanguageModel, part: Behavior, side: str, most: int, layer: int) -> Tensor:
    encoded = [lm.encode(example.prompt) for example in getattr(part, side)[:most]]
    values = capture(lm, encoded, [layer])
    return values[:, 0, 0].double()


def _on(steps: Tensor, basis: Tensor) -> Tensor:
    """Project steps `[n, d]` on orthonormal rows `[k, d]`."""
    return steps @ basis.T @ basis


def _gaps(pushes: Pusher, steps: Tensor) -> Tensor:
    return pushes.push(torch.arange(len(steps)), steps.float())[0]
