"""Behavior against the share of a vector's dimensions that is kept, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trimtab.evaluation.summary import mean
from trimtab.mechanism.case import Case
from trimtab.mechanism.sparse.dimensions import (
    ORDERS,
    STEPS,
    changes,
    dimension_effects,
    dimension_scores,
    kept_dimensions,
    whole_effect,
)
from trimtab.mechanism.sparse.sparsify import masked
from trimtab.models.chat import Prompt
from trimtab.passes.rollout import rollout
from trimtab.results.intervals import share_interval, two_way_bootstrap
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.vector import VectorSteering

SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
DRAWS = 3  # of the random order
NULLS = 2
EFFECT_TOKENS = 24  # of the responses that effects are read on
KEPT_EFFECT = 0.9  # share of the dense score below which dimensions were missed


@dataclass(frozen=True)
class SparsityPoint:
    """One sparse vector in one direction, on the test split.

    Attributes:
        order: what kept the dimensions.
        share: of the dimensions kept; `dimensions` is how many that is.
        sign: +1 steers toward and is scored there, -1 away.
        restored: whether the norm is the dense vector's.
        score: mean verdict on the wanted side, `low` to `high` its interval; over several draws for
            the random order, which the interval then allows for.
        coherence: of the same answers.
        cosine: with the dense vector.
    """

    order: str
    share: float
    dimensions: int
    sign: int
    restored: bool
    score: float
    low: float
    high: float
    coherence: float
    cosine: float

    @property
    def cell(self) -> str:
        """The score with its interval, for a table."""
        return with_interval(self.score, self.low, self.high)


@dataclass(frozen=True)
class SparsityCurve(Printable):
    """What is left of a behavior when dimensions go.

    Attributes:
        label: of the vector.
        layers: steered ones; `dimensions` in all of them.
        strengths: sign -> m.
        n: prompts scored a direction.
        completeness: sum of all effects over the effect they divide up; 1 up to the midpoint rule.
        unsteered: sign -> mean score.
        dense: one point per sign.
        null: sign -> mean score of random directions of the dense vector's length.
        points: order by order, share by share.
    """

    label: str
    layers: tuple[int, ...]
    dimensions: int
    strengths: dict[int, float]
    n: int
    completeness: float
    unsteered: dict[int, float]
    dense: tuple[SparsityPoint, ...]
    null: dict[int, float]
    points: tuple[SparsityPoint, ...]

    def least(self, order: str, sign: int, restored: bool, of: float = KEPT_EFFECT) -> float | None:
        """Return the smallest share that keeps `of` the dense score, as all larger ones do.

        None where not even the largest share does, or where the dense vector does nothing.
        """
        dense = next(p.score for p in self.dense if p.sign == sign)
        mine = [p for p in self.points if (p.order, p.sign, p.restored) == (order, sign, restored)]
        found = None
        for point in sorted(mine, key=lambda p: -p.share):
            if dense <= 0 or point.score < of * dense:
                break
            found = point.share
        return found

    def table(self) -> Table:
        """Return one line per order and share, a column per direction and norm."""
        cells = {(p.order, p.share, p.sign, p.restored): p for p in self.points}
        columns = [(s, r) for s in self.strengths for r in (False, True)]
        heads = [f"{_side(s)}, {'restored' if r else 'raw'}" for s, r in columns]
        rows = tuple(
            (order, f"{share:g}", *(cells[order, share, s, r].cell for s, r in columns))
            for order, share in dict.fromkeys((p.order, p.share) for p in self.points)
        )
        notes = [
            f"{_side(p.sign)} at m = {self.strengths[p.sign]:+.3g}: dense {p.cell}, unsteered "
            f"{number(self.unsteered[p.sign])}, random control {number(self.null[p.sign])}"
            for p in self.dense
        ]
        orders = dict.fromkeys(p.order for p in self.points)
        notes += [
            f"smallest share with {KEPT_EFFECT:.0%} of the dense score, {order}: "
            + "; ".join(
                f"{head} {_share(self.least(order, *where))}"
                for head, where in zip(heads, columns, strict=True)
            )
            for order in orders
        ]
        title = f"{self.label}: share kept of {self.dimensions} dimensions, {self.n} test prompts"
        return Table(title, ("order", "kept", *heads), rows, tuple(notes))


def sparsity_curve(
    case: Case,
    shares: Sequence[float] = SHARES,
    orders: Sequence[str] = ORDERS,
    *,
    strengths: Mapping[int, float] | None = None,
    steps: int = STEPS,
    effect_prompts: int = 16,
) -> SparsityCurve:
    """Measure a vector with fewer and fewer dimensions, raw and with its norm restored.

    Effects are read on the train split, scores on the test split.

    Args:
        case: whose vector loses dimensions.
        shares: of the dimensions to keep.
        orders: see `dimension_scores`.
        strengths: sign -> magnitude of m; the case's signs at the vector's own strength when absent.
        steps: of the integral.
        effect_prompts: prompts a direction that effects are read on.
    """
    lm, vector = case.lm, case.vector
    given = strengths or dict.fromkeys(case.signs, vector.strength)
    at = {sign: sign * abs(m) for sign, m in given.items()}
    sets = [
        run
        for sign, m in at.items()
        for run in case.under(
            vector.at(m), signs=(sign,), max_prompts=effect_prompts, max_new_tokens=EFFECT_TOKENS
        )
        .runs(case.splits.train)
        .values()
    ]
    effects = dimension_effects(lm, sets, steps)
    measure = _Measure(case, at)
    points: list[SparsityPoint] = []
    for order in orders:
        draws = null_seeds(case.seed, DRAWS if order == "random" else 1)
        scores = [dimension_scores(vector, effects, order, draw) for draw in draws]
        for share in shares:
            sparse = [masked(vector, kept_dimensions(each, share), False) for each in scores]
            for sign in at:
                points += measure.points(sparse, order, share, sign)
    return SparsityCurve(
        label=vector.label,
        layers=vector.layers,
        dimensions=lm.d_model * len(vector.layers),
        strengths=at,
        n=max(len(measure.prompts(sign)) for sign in at),
        completeness=sum(float(e.sum()) for e in effects.values()) / whole_effect(lm, sets),
        unsteered={sign: measure.unsteered(sign) for sign in at},
        dense=tuple(measure.points([vector], "dense", 1.0, sign)[0] for sign in at),
        null={sign: measure.null(sign) for sign in at},
        points=tuple(points),
    )


@dataclass(frozen=True, eq=False)
class _Measure:
    """Scores sparse vectors on the test prompts."""

    case: Case
    at: Mapping[int, float]

    def prompts(self, sign: int) -> list[Prompt]:
        return self.case.prompts(self.case.splits.test, sign)

    def answers(
        self, vector: VectorSteering, strengths: Sequence[float], sign: int
    ) -> list[tuple[list[float], float]]:
        """Return the scores and the mean coherence of the answers at each strength."""
        prompts = self.prompts(sign)
        said = rollout(
            self.case.lm, vector, prompts, strengths, max_new_tokens=self.case.max_new_tokens
        )
        return [self.case.judged(prompts, answers, sign) for answers in said]

    def unsteered(self, sign: int) -> float:
        prompts = self.prompts(sign)
        return mean(self.case.judged(prompts, self.case.answers(prompts), sign)[0])

    def null(self, sign: int) -> float:
        nulls = [random_null(self.case.vector, each) for each in null_seeds(self.case.seed, NULLS)]
        runs = [self.answers(each, [self.at[sign]], sign)[0] for each in nulls]
        return mean([mean(scores) for scores, _ in runs])

    def points(
        self, sparse: Sequence[VectorSteering], order: str, share: float, sign: int
    ) -> list[SparsityPoint]:
        """Return the raw and the restored point; `sparse` are raw vectors, one per draw."""
        cosines = [_cosine(self.case.vector, each) for each in sparse]
        # Restoring the norm is a larger strength of the same vector: both are answered together.
        runs = [
            self.answers(each, [self.at[sign], self.at[sign] / cosine], sign)
            for each, cosine in zip(sparse, cosines, strict=True)
        ]
        found = []
        for restored, some in zip((False, True), zip(*runs, strict=True), strict=True):
            grid = torch.tensor([scores for scores, _ in some], dtype=torch.float64)
            low, high = (
                share_interval(grid[0], self.case.seed)
                if len(some) == 1
                else two_way_bootstrap(grid, self.case.seed)
            )
            found.append(
                SparsityPoint(
                    order=order,
                    share=share,
                    dimensions=sum(int((s != 0).sum()) for s in changes(sparse[0]).values()),
                    sign=sign,
                    restored=restored,
                    score=float(grid.mean()),
                    low=low,
                    high=high,
                    coherence=mean([coherence for _, coherence in some]),
                    cosine=mean(cosines),
                )
            )
        return found


def _cosine(dense: VectorSteering, sparse: VectorSteering) -> float:
    """Return the cosine of what is added, layers pooled: the length of the part that is left."""
    lengths = [
        math.sqrt(sum(float(s.double().square().sum()) for s in changes(each).values()))
        for each in (dense, sparse)
    ]
    return lengths[1] / lengths[0]


def _side(sign: int) -> str:
    return "toward" if sign > 0 else "away"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:g}"
