"""What one derivative of a real model predicts of steering strength, before anything is swept.

Two kinds of context are differentiated once each (passes/slope.py):

- decisions: the first answer position of the prompts that the behavior is scored on, each a `Tilt`;
- damage: every answer token of prompts that already show the behavior, of which only the variance
  of the slopes is kept, since KL(p0 || p_m) = m^2 / 2 Var_p0(s) + O(m^3).

These are leading orders. `trusted` says how far: up to which m the decisions' KL with the next two
orders (the slope's first and second derivative, two more passes) stays within a tenth of the law
without them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.readout import readout_tokens
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import Decisions, answer_variance, decisions
from trimtab.results.tables import Printable, Table, number, percent
from trimtab.steering.vector import VectorSteering
from trimtab.theory.tilt import Tilt
from trimtab.theory.token_sets import window

BUDGETS = (0.01, 0.1, 0.5)  # nats
TARGET = 0.5  # probability of the readout words that counts as having got there
TOLERANCE = 0.1  # of the leading order, where `trusted` ends


@dataclass(frozen=True)
class BudgetStrength:
    """The strength at which a divergence is predicted to reach a budget.

    Attributes:
        nats: the budget kappa.
        damage: m at which mean damage reaches it; 0 < m, the side does not matter to leading order.
        decision: median over prompts of the same for the first answer position.
        low: lower quartile of it.
        high: upper quartile.
    """

    nats: float
    damage: float
    decision: float
    low: float
    high: float


@dataclass(frozen=True)
class StrengthPrediction(Printable):
    """What is predicted for one vector and one side; every strength is a multiplier m > 0.

    Attributes:
        sign: +1 for m > 0, -1 for m < 0.
        method: how the derivative was taken, "jvp" or "difference".
        prompts: scored prompts.
        budgets: strengths for budgets of divergence.
        trusted: m up to which the leading order agrees with the next two, at most that of one nat;
            median over the prompts that move, 0 if none does.
        cumulative: |sum_l J_l scale_l c_l| / |stream| before the final norm at m = 1, the mean
            over prompts: the push as it arrives, as a share of the stream.
        gap_slope: mean d gap / d m towards the side; None without readout words.
        windows: per prompt (first m with probability >= TARGET, last m within the largest budget); the
            first is None where the law never gets there. Empty without readout words.
        reach: share of prompts whose steepest token is a readout word; None without them.
        collapse: text of the steepest token and the share of prompts it is steepest in.
    """

    behavior: str
    label: str
    layers: tuple[int, ...]
    scope: str
    sign: int
    method: str
    prompts: int
    budgets: tuple[BudgetStrength, ...]
    trusted: float
    cumulative: float
    gap_slope: float | None
    windows: tuple[tuple[float | None, float], ...]
    reach: float | None
    collapse: tuple[tuple[str, float], ...]

    def table(self) -> Table:
        rows = tuple(
            (f"{b.nats:g}", number(b.damage), number(b.decision), number(b.low), number(b.high))
            for b in self.budgets
        )
        columns = ("nats", "m by damage", "m at decisions", "lower quartile", "upper quartile")
        lows = sorted(low for low, _ in self.windows if low is not None)
        notes = [
            f"leading orders at m = 0 ({self.method}), to be trusted up to m = {number(self.trusted)}",
            f"at m = 1 the push arrives as {percent(self.cumulative)} of the stream's norm",
            "steepest tokens: "
            + ", ".join(f"{t!r} {percent(share)}" for t, share in self.collapse),
        ]
        if self.windows:
            middle = number(lows[len(lows) // 2]) if lows else "nowhere"
            notes.append(
                f"readout words reach {percent(TARGET)} in {len(lows)} of {self.prompts} prompts, "
                f"in half of those by m = {middle}; steepest of all in {percent(self.reach)}"
            )
        side = "toward" if self.sign > 0 else "away"
        title = f"{self.behavior}: {self.label}, {side}, layers {', '.join(map(str, self.layers))}"
        return Table(f"{title}, scope {self.scope}", columns, rows, tuple(notes))


def curvature(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], h: float
) -> Tensor:
    """Return d^2 logits / d m^2 at m = 0, float64 `[n, vocab]`, from the slopes at -h and h."""
    before, after = (decisions(lm, vector, prompts, at).tilt.slope for at in (-h, h))
    return (after - before) / (2 * h)


def predict_strength(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    direction: Side = "toward",
    budgets: Sequence[float] = BUDGETS,
    max_prompts: int | None = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    unsteered: Unsteered | None = None,
) -> StrengthPrediction:
    """Predict strengths, windows and the place of collapse from derivatives at m = 0.

    Args:
        lm: the unsteered model.
        behavior: the split whose prompts are used.
        vector: any vector; its own strength does not matter.
        direction: `toward` or `away`.
        budgets: nats; windows end at the largest.
        max_prompts: cap per side; None for all.
        max_new_tokens: length of the unsteered answers that damage is read along.
        unsteered: answers to share with other measurements of this model at this length.

    Raises:
        TrimtabError: a budget that is not above 0, or as `slopes` and `Evaluator` do.
    """
    if not budgets or not all(0 < nats < math.inf for nats in budgets):
        raise TrimtabError(
            asked="strengths for budgets of divergence",
            found=f"the budgets {list(budgets)}",
            advice="give at least one, in nats above 0, such as 0.1",
        )
    side = sign_of(direction)
    evaluator = Evaluator(
        lm, behavior, max_new_tokens=max_new_tokens, max_prompts=max_prompts, unsteered=unsteered
    )
    scored = evaluator.prompts(evaluator.scored(side))
    damaged = "toward" if side > 0 else "away"
    found = decisions(lm, vector, scored)
    tilt = found.tilt
    spread = torch.cat(
        answer_variance(lm, vector, evaluator.prompts(damaged), evaluator.unsteered(damaged))
    )
    words = None if behavior.readout is None else readout_tokens(lm, behavior)
    wanted = () if words is None else (words.toward if side > 0 else words.away)
    mean_spread = float(spread.mean())
    windows: list[tuple[float | None, float]] = []
    if wanted:
        ends = (end.tolist() for end in window(tilt, wanted, TARGET, max(budgets), side))
        windows = [(None if math.isnan(a) else abs(a), abs(b)) for a, b in zip(*ends, strict=True)]
    rows = []
    for nats in budgets:
        reached = tilt.strength_for_kl(nats, side).abs()
        low, middle, high = quartiles(reached)
        kappa = math.sqrt(2 * nats / mean_spread) if mean_spread > 0 else math.inf
        rows.append(BudgetStrength(nats, kappa, middle, low, high))
    steepest = Counter(tilt.collapse_token(side).tolist())
    return StrengthPrediction(
        behavior=behavior.name,
        label=vector.at(side).label,
        layers=vector.layers,
        scope=str(vector.scope),
        sign=side,
        method=found.method,
        prompts=len(scored),
        budgets=tuple(rows),
        trusted=trusted(lm, vector, scored, tilt, side),
        cumulative=arrival(found),
        gap_slope=None if words is None else side * gap_slope(tilt, words.toward, words.away),
        windows=tuple(windows),
        reach=sum(steepest[token] for token in wanted) / len(scored) if wanted else None,
        collapse=tuple(
            (str(lm.tokenizer.decode([token])), count / len(scored))
            for token, count in steepest.most_common(3)
        ),
    )


def arrival(found: Decisions) -> float:
    """Return |J push| / |stream| before the final norm at m = 1, the mean over prompts."""
    ratio = found.stream_slope.double().norm(dim=-1) / found.stream.double().norm(dim=-1)
    return float(ratio.mean())


def gap_slope(tilt: Tilt, toward: Sequence[int], away: Sequence[int]) -> float:
    """Return the mean over contexts of d gap / d m = E_p0[s | toward] - E_p0[s | away]."""

    def mean(tokens: Sequence[int]) -> Tensor:
        weights = tilt.log_p0[:, list(tokens)].softmax(-1)
        return (weights * tilt.slope[:, list(tokens)]).sum(-1)

    return float((mean(toward) - mean(away)).mean())


def trusted(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], tilt: Tilt, side: int
) -> float:
    """Return the m up to which KL with two more orders is within `TOLERANCE` of KL without; the median.

    Logits then move by m s + m^2 / 2 s' + m^3 / 6 s'', from slopes at -h, 0 and h, where h is the
    strength of a hundredth of a nat. (Curvature alone can vanish in KL by chance.) The look ends at
    one nat.
    """
    reached = tilt.strength_for_kl(0.01)
    moves = reached.isfinite()
    if not bool(moves.any()):
        return 0.0
    h = float(reached[moves].median())
    low, high = (decisions(lm, vector, prompts, at).tilt.slope[moves] for at in (-h, h))
    straight = Tilt(tilt.log_p0[moves], tilt.slope[moves])
    second, third = (high - low) / (2 * h), (high - 2 * straight.slope + low) / h**2
    before = off_before = torch.zeros(len(second), dtype=torch.float64)
    agreed = torch.full_like(before, math.nan)
    for nats in (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0):
        m = straight.strength_for_kl(nats, side)
        by = m[:, None]
        bent = straight.slope + second * by / 2 + third * by**2 / 6
        off = (Tilt(straight.log_p0, bent).kl(m) / nats - 1).abs()
        # To leading order the two part in proportion to m.
        share = (TOLERANCE - off_before) / (off - off_before)
        crossing = before + share * (m.abs() - before)
        agreed = torch.where(agreed.isnan() & (off > TOLERANCE), crossing, agreed)
        before, off_before = m.abs(), off
    return float(torch.where(agreed.isnan(), before, agreed).median())


def quartiles(values: Tensor) -> tuple[float, float, float]:
    """Return the quartiles of `[n]` values, some of them infinite perhaps; nan for no values."""
    if not values.numel():
        return math.nan, math.nan, math.nan
    # Between two infinities there is nothing to interpolate.
    how = "linear" if bool(values.isfinite().all()) else "nearest"
    low, middle, high = (float(values.quantile(q, interpolation=how)) for q in (0.25, 0.5, 0.75))
    return low, middle, high
