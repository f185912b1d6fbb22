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

from trimtab.behaviors.behavior import Behavior, Example
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import ReadoutTokens
from trimtab.margins.close import Pusher, pusher
from trimtab.margins.radius import Gradients, gap_gradients
from trimtab.mechanism.geometry.jacobian import depth_name, direction_at
from trimtab.mechanism.geometry.rank import leading
from trimtab.models.capture import capture
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import RESAMPLES
from trimtab.results.quantiles import Estimate
from trimtab.results.tables import ABSENT, Printable, Table, number
from trimtab.steering.vector import VectorSteering

REACHED = 0.9
MODES = ("added", "ablated")
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
        low: 2.5th percentile of k over resampled prompts.
        high: 97.5th percentile.
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
                _rank(row),
                *(number(point.share.mean) for point in row.curve),
                number(row.vector.mean),
            )
            for row in self.rows
        )
        columns = ("", "subspace", "full change, nats", "rank", *(f"k={k}" for k in ks), "vector")
        notes = (
            f"{self.site}, last position; share of the full change of the gap by k; subspaces from "
            f"{self.trained} train pairs, {self.n} held-out pairs",
            "rank: smallest k tried that reaches 90 %, with its interval over prompts; random: null; a "
            "subspace has at most as many dimensions as its train rows",
        )
        return Table("Functional rank", columns, rows, notes)


def functional_rank(
    lm: LanguageModel,
    vector: VectorSteering,
    tokens: ReadoutTokens,
    train: Behavior,
    test: Behavior,
    layer: int,
    max_pairs: tuple[int, int] = (64, 16),
    ks: Sequence[int] | None = None,
    aggregator: str = "logsumexp",
    seed: int = 0,
    gradients: Mapping[str, Gradients] | None = None,
) -> FunctionalRank:
    """Find the smallest subspaces that carry the behavior at one layer.

    Args:
        lm: the unsteered model.
        vector: whose direction at the layer is looked at beside the subspaces.
        tokens: readout of the gap.
        train: whose prompts give the subspaces.
        test: whose pairs are measured; sides that are not paired are put together in order.
        layer: 0-based, whose output is changed.
        max_pairs: at most so many train and test pairs.
        ks: dimensions tried; powers of two up to the width when absent.
        aggregator: of the gap.
        seed: of random subspaces and intervals.
        gradients: of the gap of the train prompts used, by side; read when absent.

    Raises:
        TrimtabError: fewer than two held-out pairs, or dimensions out of range.
    """
    chosen = sorted(set(ks if ks is not None else _powers(lm.d_model)))
    n = min(len(test.toward), len(test.away), max_pairs[1])
    if n < 2 or not chosen or chosen[0] < 1 or chosen[-1] > lm.d_model:
        raise TrimtabError(
            asked=f"a functional rank from {n} held-out pairs, dimensions {chosen}",
            found=f"fewer than two pairs, or dimensions outside 1 to {lm.d_model}",
            advice="give more prompts, or other dimensions",
        )
    learned = {side: getattr(train, side)[: max_pairs[0]] for side in ("toward", "away")}
    bases, mean_away = _bases(lm, tokens, learned, layer, aggregator, seed, gradients)
    held = {
        side: [lm.encode(example.prompt) for example in getattr(test, side)[:n]]
        for side in ("toward", "away")
    }
    states = {side: _states(lm, held[side], layer) for side in held}
    moves = {
        "added": ("away", states["toward"] - states["away"]),
        "ablated": ("toward", mean_away - states["toward"]),
    }
    own = direction_at(vector, layer + 1)
    rows = []
    for mode, (side, steps) in moves.items():
        pushes = pusher(lm, tokens, held[side], layer, aggregator)
        sign = 1 if mode == "added" else -1
        plain, full = (_gaps(pushes, steps * factor) for factor in (0.0, 1.0))
        alone = None if own is None else _gaps(pushes, _on(steps, own.double()[None]))
        for basis in BASES:
            curve = [_gaps(pushes, _on(steps, bases[basis][:k])) for k in chosen]
            changes = sign * (torch.stack(curve) - plain)
            vector_change = None if alone is None else sign * (alone - plain)
            rows.append(
                _row(mode, basis, chosen, sign * (full - plain), changes, vector_change, seed)
            )
    trained = min(len(side) for side in learned.values())
    return FunctionalRank(depth_name(layer + 1), trained, n, tuple(rows))


def smallest(ks: Sequence[int], shares: Tensor, reached: float = REACHED) -> float:
    """Return the smallest k whose share `[ks]` reaches the mark; infinite for none."""
    return next(
        (float(k) for k, s in zip(ks, shares.tolist(), strict=True) if s >= reached), math.inf
    )


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


def _bases(
    lm: LanguageModel,
    tokens: ReadoutTokens,
    learned: Mapping[str, Sequence[Example]],
    layer: int,
    aggregator: str,
    seed: int,
    gradients: Mapping[str, Gradients] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Orthonormal rows, strongest first, of each kind of subspace; and the mean away state."""
    encoded = {side: [lm.encode(e.prompt) for e in some] for side, some in learned.items()}
    states = {side: _states(lm, some, layer) for side, some in encoded.items()}
    n = min(len(some) for some in states.values())
    if gradients is None:
        gradients = {s: gap_gradients(lm, tokens, some, aggregator) for s, some in encoded.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(lm.d_model, lm.d_model, generator=generator, dtype=torch.float64)
    found = {
        "differences": leading(states["toward"][:n] - states["away"][:n]),
        "gradients": leading(torch.cat([gradients[side].grad[:, layer] for side in encoded])),
        "random": torch.linalg.qr(drawn).Q.T,
    }
    return found, states["away"].mean(0)


def _states(lm: LanguageModel, encoded: Sequence[Encoded], layer: int) -> Tensor:
    values = capture(lm, encoded, [layer])
    return values[:, 0, 0].double()


def _on(steps: Tensor, basis: Tensor) -> Tensor:
    """Project steps `[n, d]` on orthonormal rows `[k, d]`."""
    return steps @ basis.T @ basis


def _gaps(pushes: Pusher, steps: Tensor) -> Tensor:
    return pushes.push(torch.arange(len(steps)), steps.float())[0]


def _powers(width: int) -> list[int]:
    found = [2**k for k in range(width.bit_length()) if 2**k < width]
    return [*found, width]


def _rank(row: FunctionalRow) -> str:
    if math.isnan(row.k):
        return ABSENT
    low, high = ("inf" if math.isinf(x) else f"{x:.0f}" for x in (row.low, row.high))
    return f"{'inf' if math.isinf(row.k) else f'{row.k:.0f}'} [{low}, {high}]"
