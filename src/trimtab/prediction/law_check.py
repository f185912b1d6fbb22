"""Prediction against measurement: where the laws of steering strength hold on a model, and where not.

Four predictions of p_m from what is known at m = 0, from the leading order up:

- quadratic: KL = m^2 / 2 Var_p0(s);
- tilt: logits move on a line, p_m ~ p0 exp(m s);
- norm: the stream before the final norm moves on a line, and the head is closed form
  (passes/head.py); for a push at the last layer this is exact at every m;
- bend: the tilt with curvature, p_m ~ p0 exp(m s + m^2 / 2 s'), two passes more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import token_kl
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import Decisions, decisions
from trimtab.passes.fan import Fan
from trimtab.passes.head import STREAM_SITES, collapse_logits, read_head
from trimtab.prediction.predict import BUDGETS, curvature, quartiles
from trimtab.results.intervals import spearman
from trimtab.results.tables import Printable, Table, number, percent
from trimtab.steering.vector import VectorSteering
from trimtab.theory.tilt import Tilt

PREDICTIONS = ("quadratic", "tilt", "norm", "bend")
SMALL = 0.001  # nats: the small-strength regime, in which the order of peaks is compared
MIDDLE = 0.5  # nats: the range over which bumps are counted
GRID = 31  # strengths on which peaks are looked for
LIKELY = -16.0  # log-probability below which float32 logits are too coarse for a peak
NOISE = 1e-4  # of a log-probability between two grid points
FAR = 1e5  # of the stream's norm: "infinite" strength, far above any block and below overflow
_KL = Callable[[Tensor], Tensor]  # m [n] -> nats [n]


@dataclass(frozen=True)
class BudgetCheck:
    """Measured over predicted divergence at the strength where a prediction says `nats`.

    Prompts for which the prediction never says so are left out (the norm law levels off); without
    any the strength is inf and the ratio nan.

    Attributes:
        prediction: one of `PREDICTIONS`.
        nats: the budget.
        strength: median over prompts of that strength m.
        ratio: measured KL / nats, the median over prompts; 1 is right.
        low: lower quartile.
        high: upper quartile.
    """

    prediction: str
    nats: float
    strength: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """One strength m of the measured curve, with what the tilt and the norm law say there.

    KL in nats is the median over prompts with quartiles; probabilities are means of the mass on the
    readout words, None without them.
    """

    strength: float
    kl: float
    kl_low: float
    kl_high: float
    predicted: dict[str, float]
    probability: float | None
    probability_tilt: float | None
    probability_norm: float | None


@dataclass(frozen=True)
class LawCheck(Printable):
    """How well the laws hold for one vector and side on some prompts.

    Attributes:
        budgets: one row per prediction and budget.
        exponent: slope of log KL in log m at small m; the law says 2.
        peaks: Spearman correlation over tokens of the predicted and the measured strength at which
            each token is most likely among strengths up to `SMALL` nats, where tokens that peak
            further out count as peaking at the edge; median over prompts.
        peaks_inside: the same over tokens whose predicted peak lies within that range.
        one_bump: share of tokens whose measured probability never rises again once it has fallen,
            over strengths up to `MIDDLE` nats on both sides.
        collapse: the token predicted for m -> infinity; None where no push grows in the stream.
        collapse_right: share of prompts whose most likely token is that one at a huge m.
        curve: the measured curve.
        last_layer: whether the norm law is exact here.
    """

    label: str
    layers: tuple[int, ...]
    scope: str
    sign: int
    prompts: int
    budgets: tuple[BudgetCheck, ...]
    exponent: float
    peaks: float
    peaks_inside: float
    one_bump: float
    collapse: str | None
    collapse_right: float | None
    curve: tuple[CurvePoint, ...]
    last_layer: bool

    def budget(self, prediction: str, nats: float) -> BudgetCheck:
        """Return the row of a prediction and a budget."""
        return next(b for b in self.budgets if (b.prediction, b.nats) == (prediction, nats))

    def table(self) -> Table:
        rows = tuple(
            (
                b.prediction,
                f"{b.nats:g}",
                number(b.strength),
                f"{number(b.ratio)} ({number(b.low)} to {number(b.high)})",
            )
            for b in self.budgets
        )
        notes = [
            f"exponent of KL in m: {number(self.exponent, 3)}",
            f"order of peaks, predicted against measured: {number(self.peaks, 3)} over all tokens, "
            f"{number(self.peaks_inside, 3)} over those that peak within {SMALL:g} nats",
            f"tokens with one bump up to {MIDDLE:g} nats: {percent(self.one_bump)}",
        ]
        if self.collapse is not None:
            notes.append(f"collapses into {self.collapse!r}: {percent(self.collapse_right)} right")
        columns = ("prediction", "nats", "m", "measured / predicted (quartiles)")
        where = f"layers {', '.join(map(str, self.layers))}, scope {self.scope}"
        return Table(f"{self.label}, {where}, {self.prompts} prompts", columns, rows, tuple(notes))


def check_laws(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    *,
    sign: int = 1,
    wanted: Sequence[int] = (),
    budgets: Sequence[float] = BUDGETS,
    points: int = 17,
) -> LawCheck:
    """Compare what one derivative predicts with what the model does, at the first answer position.

    The model is best in float32: divergences of a thousandth of a nat are read. Prompts that the
    vector does not move at all are left out; `wanted` are the readout tokens of the side, for the
    probabilities on the curve of so many `points`.

    Raises:
        TrimtabError: as `decisions`; no head of a known form; a vector that moves no prompt.
    """
    side = 1 if sign > 0 else -1
    prompts, found = _moving(lm, vector, prompts)
    tilt = found.tilt
    fan = Fan(lm, vector, [lm.encode(prompt) for prompt in prompts])
    laws = _predictions(lm, vector, prompts, found)
    rows: list[BudgetCheck] = []
    for name, law in laws.items():
        for nats in budgets:
            m = _invert(law, nats, tilt.strength_for_kl(nats).abs(), side)
            there = m.isfinite()
            measured = _measured(lm, vector, prompts, tilt, side * torch.where(there, m, 0.0))
            low, middle, high = quartiles(measured[there] / nats)
            strength = float(m[there].median()) if bool(there.any()) else math.inf
            rows.append(BudgetCheck(name, nats, strength, middle, low, high))
    token, right = _collapse(lm, fan, vector, side, found.stream)
    return LawCheck(
        label=vector.at(side).label,
        layers=vector.layers,
        scope=str(vector.scope),
        sign=side,
        prompts=len(prompts),
        budgets=tuple(rows),
        exponent=_exponent(lm, vector, prompts, tilt, side),
        **_peaks(fan, tilt),
        one_bump=_one_bump(fan, tilt),
        collapse=None if token is None else str(lm.tokenizer.decode([token])),
        collapse_right=right,
        curve=_curve(lm, fan, found, laws, wanted, side, points),
        last_layer=vector.layers[0] == lm.n_layers - 1 and vector.site == "resid_post",
    )


def _moving(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], Decisions]:
    """The prompts whose first answer position moves, and how it does."""
    found = decisions(lm, vector, prompts)
    moves = found.tilt.strength_for_kl(SMALL).isfinite().tolist()
    kept = [prompt for prompt, moved in zip(prompts, moves, strict=True) if moved]
    if not kept:
        raise TrimtabError(
            asked=f"to check the laws for {vector.label}",
            found=f"scope {vector.scope} moves the first answer position of no prompt",
            advice="use a scope that covers or precedes it, such as all or last",
        )
    return kept, found if len(kept) == len(moves) else decisions(lm, vector, kept)


def _predictions(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], found: Decisions
) -> dict[str, _KL]:
    tilt, head = found.tilt, read_head(lm)
    step = float(tilt.strength_for_kl(SMALL).median())
    bend = curvature(lm, vector, prompts, step)
    p0 = tilt.log_p0

    def norm(m: Tensor) -> Tensor:
        return token_kl(p0, head.along(found.stream, found.stream_slope, m).log_softmax(-1))

    def bent(m: Tensor) -> Tensor:
        return Tilt(p0, tilt.slope + bend * (m / 2)[:, None]).kl(m)

    return dict(zip(PREDICTIONS, (tilt.quadratic_kl, tilt.kl, norm, bent), strict=True))


def _invert(law: _KL, nats: float, start: Tensor, side: int) -> Tensor:
    """The smallest m > 0 on a fine grid around `start` where a law reaches the budget; inf if none."""
    grid = torch.logspace(-1, 1.2, 61, dtype=torch.float64)[:, None] * start
    values = torch.stack([law(side * m) for m in grid])
    reached = values >= nats
    first = reached.double().argmax(0)
    before = (first - 1).clamp_min(0)
    columns = torch.arange(len(start))
    a, b = values[before, columns].clamp_min(1e-300).log(), values[first, columns].log()
    x, y = grid[before, columns].log(), grid[first, columns].log()
    share = ((math.log(nats) - a) / (b - a).clamp_min(1e-12)).clamp(0, 1)
    return torch.where(reached.any(0), (x + share * (y - x)).exp(), math.inf)


@torch.no_grad()
def _measured(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], tilt: Tilt, m: Tensor
) -> Tensor:
    """KL(p0 || p_m) of every prompt at its own strength, float64 `[n]`."""
    with vector.on(lm, row_strengths=m.tolist()):
        return token_kl(tilt.log_p0, lm.next_logits(list(prompts)).double().log_softmax(-1))


def _exponent(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], tilt: Tilt, side: int
) -> float:
    """The slope of log KL between the strengths of one and four ten-thousandths of a nat."""
    ends = [tilt.strength_for_kl(nats).abs() for nats in (1e-4, 4e-4)]
    low, high = (_measured(lm, vector, prompts, tilt, side * m) for m in ends)
    usable = (low > 0) & (high > 0)
    rise = (high[usable] / low[usable]).log() / (ends[1] / ends[0])[usable].log()
    return float(rise.median()) if rise.numel() else math.nan


def _around_zero(fan: Fan, tilt: Tilt, nats: float) -> tuple[Tensor, Tensor]:
    """Strengths up to a divergence on both sides, and log-probabilities there `[GRID, n, vocab]`."""
    radius = float(tilt.strength_for_kl(nats).median())
    grid = torch.linspace(-radius, radius, GRID, dtype=torch.float64)
    return grid, fan.next_logits(grid.tolist()).double().log_softmax(-1)


def _peaks(fan: Fan, tilt: Tilt) -> dict[str, float]:
    """Rank correlation of predicted and measured peaks: all tokens, and those predicted inside."""
    grid, logp = _around_zero(fan, tilt, SMALL)
    radius = float(grid[-1])
    predicted = tilt.peaks().clamp(-radius, radius)
    found: dict[str, list[float]] = {"peaks": [], "peaks_inside": []}
    for i in range(logp.shape[1]):
        likely = (tilt.log_p0[i] > LIKELY).nonzero().flatten()
        top = _top(logp[:, i, likely], grid).clamp(-radius, radius)
        guess = predicted[i, likely]
        within = guess.abs() < radius
        for listed, chosen in zip(found.values(), (torch.ones_like(within), within), strict=True):
            if int(chosen.sum()) >= 3:
                listed.append(spearman(guess[chosen], top[chosen]))
    return {
        name: float(torch.tensor(values or [math.nan], dtype=torch.float64).nanquantile(0.5))
        for name, values in found.items()
    }


def _one_bump(fan: Fan, tilt: Tilt) -> float:
    _, logp = _around_zero(fan, tilt, MIDDLE)
    falls, total = 0, 0
    for i in range(logp.shape[1]):
        curve = logp[:, i, tilt.log_p0[i] > LIKELY]
        fallen = curve.cummax(0).values - curve > NOISE
        again = curve.diff(dim=0) > NOISE
        falls += int((fallen[:-1] & again).any(0).sum())
        total += curve.shape[1]
    return 1 - falls / total if total else math.nan


def _top(curve: Tensor, grid: Tensor) -> Tensor:
    """Where each column of `[grid, tokens]` is largest, between grid points by a parabola."""
    best = curve.argmax(0)
    middle = best.clamp(1, len(grid) - 2)
    columns = torch.arange(curve.shape[1])
    a, b, c = (curve[middle + d, columns] for d in (-1, 0, 1))
    bend = a - 2 * b + c
    offset = torch.where(bend < 0, 0.5 * (a - c) / bend.clamp_max(-1e-300), torch.zeros_like(b))
    return grid[middle] + offset.clamp(-1, 1) * (grid[1] - grid[0])


def _collapse(
    lm: LanguageModel, fan: Fan, vector: VectorSteering, side: int, stream: Tensor
) -> tuple[int | None, float | None]:
    # Of a window the first answer position itself may lie outside.
    if (
        vector.operation != "add"
        or vector.site not in STREAM_SITES
        or vector.scope.name == "window"
    ):
        return None, None
    token = int(collapse_logits(lm, vector, side).argmax())
    push = sum(vector.scales[k] * vector.directions[k].double() for k in vector.layers)
    m = FAR * float(stream.norm(dim=-1).max()) / float(torch.as_tensor(push).norm())
    far = fan.next_logits([side * m])[0].argmax(-1)
    return token, float((far == token).double().mean())


def _curve(
    lm: LanguageModel,
    fan: Fan,
    found: Decisions,
    laws: Mapping[str, _KL],
    wanted: Sequence[int],
    side: int,
    points: int,
) -> tuple[CurvePoint, ...]:
    tilt, head = found.tilt, read_head(lm)
    ends = [float(tilt.strength_for_kl(nats).abs().median()) for nats in (1e-3, 2.0)]
    grid = torch.logspace(math.log10(ends[0]), math.log10(ends[1]), points, dtype=torch.float64)
    logp = fan.next_logits((side * grid).tolist()).double().log_softmax(-1)
    chosen = list(wanted)
    rows: list[CurvePoint] = []
    for m, q in zip((side * grid).tolist(), logp, strict=True):
        kl = token_kl(tilt.log_p0, q)
        at = torch.full((len(kl),), m, dtype=torch.float64)
        norm = head.along(found.stream, found.stream_slope, at).softmax(-1)
        shares: list[float | None] = [None] * 3
        if chosen:
            masses = [p[:, chosen].sum(-1) for p in (q.exp(), norm)]
            masses.insert(1, tilt.concept_probability(chosen, at))
            shares = [float(mass.mean()) for mass in masses]
        rows.append(
            CurvePoint(
                m,
                float(kl.median()),
                float(kl.quantile(0.25)),
                float(kl.quantile(0.75)),
                {name: float(law(at).median()) for name, law in laws.items()},
                *shares,
            )
        )
    return tuple(rows)
