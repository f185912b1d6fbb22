"""The four theorems of steering strength, predicted and checked against brute force.

Predictions come from `FeaturesModel.tilt`, that is from p(z|c) and M(z) alone; brute force is the
softmax of W (h_c + alpha v). Statements: Taimeskhanov, Vaiter and Garreau, arXiv 2602.02712,
theorems 3.3 (a), 3.6 (b), 3.8 (c) and proposition B.1 (d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tools.theorems.features_model import FeaturesModel
from trimtab.errors import TrimtabError
from trimtab.results.tables import Printable, Table
from trimtab.theory.tilt import Tilt

ALPHAS = tuple(i / 20 for i in range(-120, 121))
SMALL = (1e-3, 1e-2, 1e-1)  # where the leading order of the cross-entropy is looked at
FAR = 200.0  # over the gap between the two extreme log-odds: all else is below exp(-200) there
PANELS, NODES = 24, 10  # of Gauss and Legendre's rule on [0, alpha]


@dataclass(frozen=True)
class Check:
    """One prediction over all contexts and strengths.

    Attributes:
        theorem: `a` to `d`.
        claim: what was compared.
        error: largest difference from brute force; None for a claim that is counted.
        holds: within the tolerance asked for, or true in every case.
        detail: in how many cases, or the unit of the error.
    """

    theorem: str
    claim: str
    error: float | None
    holds: bool
    detail: str


@dataclass(frozen=True, eq=False)
class Theorems(Printable):
    """Predicted and brute-force curves for one context, and the checks over all of them.

    Attributes:
        tokens: the vocabulary [vocab].
        concept_of: the concept of each token.
        target: the concept steered toward.
        context: the concept of the context whose curves these are.
        log_odds: M, [vocab].
        p0: p(z) in this context, unsteered, [vocab].
        alphas: strengths [k].
        token_change: Delta p(z | alpha) as predicted, [k, vocab].
        token_change_measured: the same by brute force.
        peaks: the alpha of each token's bump, [vocab]; +-inf for the extreme ones.
        peaks_measured: the same by brute force.
        concept_change: Delta p(C | alpha) by the tanh formula, [k] for each concept.
        concept_change_measured: the same by brute force.
        nu: K_C - K_notC in closed form, [k] for each concept.
        nu_integrated: the same as the integral of E[M | C] - E[M | not C].
        entropy_change: Delta CE by brute force over all contexts, nats, [k].
        entropy_quadratic: alpha^2 / 2 sum_j pi_j Var_j(M), [k].
        limits: p(z) at alpha = -inf and inf as predicted, [2, vocab].
        limits_measured: by brute force at a very large strength.
        checks: every prediction over all contexts.
    """

    tokens: tuple[str, ...]
    concept_of: tuple[str, ...]
    target: str
    context: str
    log_odds: Tensor
    p0: Tensor
    alphas: Tensor
    token_change: Tensor
    token_change_measured: Tensor
    peaks: Tensor
    peaks_measured: Tensor
    concept_change: Mapping[str, Tensor]
    concept_change_measured: Mapping[str, Tensor]
    nu: Mapping[str, Tensor]
    nu_integrated: Mapping[str, Tensor]
    entropy_change: Tensor
    entropy_quadratic: Tensor
    limits: Tensor
    limits_measured: Tensor
    checks: tuple[Check, ...]

    @property
    def max_error(self) -> float:
        """The largest difference from brute force of any prediction."""
        return max(check.error for check in self.checks if check.error is not None)

    def table(self) -> Table:
        """Return one line per prediction."""
        rows = tuple(
            (
                f"({check.theorem})",
                check.claim,
                "" if check.error is None else f"{check.error:.1e}",
                "holds" if check.holds else "FAILS",
                check.detail,
            )
            for check in self.checks
        )
        notes = ("error: largest difference from softmax(W (h + alpha v)) over all contexts",)
        columns = ("theorem", "prediction", "error", "verdict", "where")
        return Table("theorems of steering strength", columns, rows, notes)


class _Parts(NamedTuple):
    """What one theorem adds: the shown context's values, and checks over all contexts."""

    values: tuple[Tensor, ...]
    checks: list[Check]


def theorems(
    model: FeaturesModel,
    *,
    alphas: Sequence[float] = ALPHAS,
    context: int | None = None,
    tolerance: float = 1e-10,
) -> Theorems:
    """Predict the four theorems' curves for a model and compare each with brute force.

    Args:
        model: the setting.
        alphas: strengths of the curves.
        context: the context whose curves are kept; the first negative one when not given.
        tolerance: largest difference that counts as agreement.

    Raises:
        TrimtabError: when the context does not exist or no strengths are given.
    """
    index = model.negative[0] if context is None else context
    if not 0 <= index < len(model.contexts) or not alphas:
        raise TrimtabError(
            asked=f"the theorems' curves for context {index} at {len(alphas)} strengths",
            found=f"a model with {len(model.contexts)} contexts",
            advice="count contexts from 0, and give at least one strength",
        )
    grid = torch.tensor(list(alphas), dtype=torch.float64)
    measured = model.steered(grid).exp() - model.probabilities
    predicted = model.tilt.log_probs(grid[:, None]).exp() - model.probabilities
    bumps = _bumps(model, tolerance)
    concepts = {name: _concept(model, name, grid, measured) for name in model.concepts}
    entropy = _entropy(model, grid, tolerance)
    limits = _limits(model, tolerance)
    checks = [
        _within("a", "Delta p(z | alpha)", predicted - measured, tolerance),
        *bumps.checks,
        *_concept_checks(list(concepts.values()), tolerance),
        *entropy.checks,
        *limits.checks,
    ]
    shown = {name: [values[:, index] for values in part] for name, part in concepts.items()}
    return Theorems(
        tokens=model.tokens,
        concept_of=model.concept_of,
        target=model.target,
        context=model.contexts[index],
        log_odds=model.log_odds,
        p0=model.probabilities[index],
        alphas=grid,
        token_change=predicted[:, index],
        token_change_measured=measured[:, index],
        peaks=bumps.values[0][index],
        peaks_measured=bumps.values[1][index],
        concept_change={name: part[0] for name, part in shown.items()},
        concept_change_measured={name: part[4] for name, part in shown.items()},
        nu={name: part[2] for name, part in shown.items()},
        nu_integrated={name: part[3] for name, part in shown.items()},
        entropy_change=entropy.values[0],
        entropy_quadratic=entropy.values[1],
        limits=limits.values[0][:, index],
        limits_measured=limits.values[1][:, index],
        checks=tuple(checks),
    )


def _bumps(model: FeaturesModel, tolerance: float) -> _Parts:
    """Theorem 3.3: one bump per token, off-target peaks first, extremes monotone."""
    predicted, measured = model.tilt.peaks(), _brute_peaks(model)
    finite = predicted.isfinite()
    same_ends = torch.equal(predicted[~finite], measured[~finite])
    gaps = torch.where(finite, predicted - measured, 0.0) / predicted.abs().clamp_min(1.0)
    reach = 1.5 * float(predicted[finite].abs().max()) + 5
    turns, first = _turns(model, reach)
    extreme = (model.log_odds == model.log_odds.max()) | (model.log_odds == model.log_odds.min())
    bump = turns.eq(1) & first
    monotone = turns.eq(0) & first.eq(model.log_odds > 0)
    shape = torch.where(extreme, monotone, bump)
    target = torch.tensor([name == model.target for name in model.concept_of])
    ordered = measured[:, ~target].max(-1).values < measured[:, target].min(-1).values
    return _Parts(
        (predicted, measured),
        [
            _within("a", "alpha of every peak", gaps, tolerance, "relative above 1", same_ends),
            _count("a", "one bump, or monotone if extreme in M", shape, "tokens in contexts"),
            _count("a", "off-target tokens peak before target tokens", ordered, "contexts"),
        ],
    )


def _brute_peaks(model: FeaturesModel) -> Tensor:
    """Return where d/dalpha log softmax(W (h + alpha v)) is 0, [contexts, vocab], by halving.

    The derivative is (W v)_z - E_alpha[W v]; without a change of sign, the end it points to.
    """
    push = model.unembedding @ model.steering_vector
    # Tokens with the same log-odds differ in W v by rounding alone.
    push = (push - push.mean()).round(decimals=13)
    logits = model.features @ model.unembedding.T

    def rising(alpha: Tensor) -> Tensor:
        p = torch.softmax(logits[:, None] + alpha[..., None] * push, dim=-1)
        return (p * (push[:, None] - push)).sum(-1) > 0

    low, high = (torch.full_like(logits, _far(model.log_odds, sign)) for sign in (-1.0, 1.0))
    falls, rises = ~rising(low), rising(high)
    for _ in range(100):
        middle = 0.5 * (low + high)
        up = rising(middle)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return torch.where(falls, -math.inf, torch.where(rises, math.inf, high))


def _turns(model: FeaturesModel, reach: float) -> tuple[Tensor, Tensor]:
    """Count turns of log p along a fine grid, [contexts, vocab], and say whether it rises first."""
    steps = model.steered(torch.linspace(-reach, reach, 4001, dtype=torch.float64)).diff(dim=0)
    rising = steps > 0
    return (rising[1:] != rising[:-1]).sum(dim=0), rising[0]


def _concept(
    model: FeaturesModel, name: str, alphas: Tensor, token_change: Tensor
) -> tuple[Tensor, ...]:
    """Theorem 3.6 for one concept: tanh of nu, tanh of its integral, nu, its integral, brute force.

    Each is [k, contexts].
    """
    tilt, ids = model.tilt, model.members(name)
    r = tilt.concept_log_odds(ids, 0.0)
    nu = tilt.concept_log_odds(ids, alphas[:, None]) - r
    integrated = _integral(tilt, ids, alphas)
    by_tanh = [
        (torch.tanh((value + r) / 2) - torch.tanh(r / 2)) / (2 * len(ids))
        for value in (nu, integrated)
    ]
    return *by_tanh, nu, integrated, token_change[..., ids].mean(-1)


def _integral(tilt: Tilt, ids: Sequence[int], alphas: Tensor) -> Tensor:
    """Return the integral of E_t[M | C] - E_t[M | not C] from 0 to each alpha, [k, contexts]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    panels = torch.arange(PANELS, dtype=torch.float64)[:, None]
    share = ((panels + (torch.from_numpy(nodes) + 1) / 2) / PANELS).flatten()
    weight = (torch.from_numpy(weights) / (2 * PANELS)).repeat(PANELS)
    at = alphas[:, None] * share
    values = tilt.concept_slope(ids, at.flatten()[:, None]).unflatten(0, at.shape)
    return alphas[:, None] * (values * weight[None, :, None]).sum(1)


def _concept_checks(parts: Sequence[tuple[Tensor, ...]], tolerance: float) -> list[Check]:
    closed, integrated, nu, integral, measured = (
        torch.stack([part[i] for part in parts]) for i in range(5)
    )
    return [
        _within("b", "Delta p(C | alpha), nu = K_C - K_notC", closed - measured, tolerance),
        _within("b", "Delta p(C | alpha), nu integrated", integrated - measured, tolerance),
        _within("b", "nu: closed form against integral", nu - integral, tolerance, "nats"),
    ]


def _entropy(model: FeaturesModel, alphas: Tensor, tolerance: float) -> _Parts:
    """Theorem 3.8: exact through psi, quadratic to leading order."""
    tilt = model.tilt
    at_zero = model.cross_entropy(0.0)
    change = model.cross_entropy(alphas) - at_zero
    curvature = tilt.variance(0.0) @ model.weights
    exact = tilt.kl(alphas[:, None]) @ model.weights
    small = torch.tensor(SMALL, dtype=torch.float64)
    rest = (model.cross_entropy(small) - at_zero - 0.5 * curvature * small**2).abs() / small**2
    ratios = ", ".join(f"{float(r):.1e} at {a:g}" for r, a in zip(rest, SMALL, strict=True))
    # o(alpha^2): a hundredth of the strength leaves less than a twentieth of the rest's share.
    vanishing = bool(rest[0] <= rest[2] / 20)
    return _Parts(
        (change, 0.5 * curvature * alphas**2),
        [
            _within(
                "c", "Delta CE = sum_j pi_j (psi_j - alpha psi_j'(0))", change - exact, tolerance
            ),
            Check("c", "(Delta CE - quadratic) / alpha^2 goes to 0", None, vanishing, ratios),
        ],
    )


def _limits(model: FeaturesModel, tolerance: float) -> _Parts:
    """Proposition B.1 and the limits of theorem 3.6, at a strength where all else has vanished."""
    log_p0, m = model.tilt.log_p0, model.log_odds
    at_limit, measured, concept_errors, entropy_errors = [], [], [], []
    for sign in (-1.0, 1.0):
        signed = sign * m
        extreme = signed == signed.max()
        alpha = _far(m, sign)
        mass = log_p0[:, extreme].logsumexp(-1)
        limit = torch.where(extreme, (log_p0 - mass[:, None]).exp(), 0.0)
        brute = model.steered(alpha).exp()
        at_limit.append(limit)
        measured.append(brute)
        for ids in map(model.members, model.concepts):
            if not bool(extreme[ids].any()):
                change = (brute - model.probabilities)[:, ids].mean(-1)
                concept_errors.append(change + model.probabilities[:, ids].mean(-1))
        # psi approaches alpha max M + log of the extreme tokens' mass: a straight line.
        line = ((alpha * (signed.max() * sign - model.probabilities @ m)) + mass) @ model.weights
        change = model.cross_entropy(alpha) - model.cross_entropy(0.0)
        entropy_errors.append((change - line) / line)
    predicted, brute = torch.stack(at_limit), torch.stack(measured)
    concepts = torch.stack(concept_errors) if concept_errors else torch.zeros(1)
    return _Parts(
        (predicted, brute),
        [
            _within("d", "p(z) gathers on the extreme tokens", predicted - brute, tolerance),
            _within("d", "a concept without extreme tokens ends at -mean p0", concepts, tolerance),
            _within(
                "d",
                "Delta CE ends on a straight line",
                torch.stack(entropy_errors),
                tolerance,
                "relative",
            ),
        ],
    )


def _far(log_odds: Tensor, sign: float) -> float:
    """Return a strength at which all but the extreme tokens of one side have vanished."""
    signed = sign * log_odds
    return sign * FAR / float(signed.max() - signed[signed < signed.max()].max())


def _within(
    theorem: str,
    claim: str,
    difference: Tensor,
    tolerance: float,
    detail: str = "",
    also: bool = True,
) -> Check:
    error = float(difference.abs().max())
    return Check(theorem, claim, error, error <= tolerance and also, detail)


def _count(theorem: str, claim: str, cases: Tensor, what: str) -> Check:
    detail = f"{int(cases.sum())} of {cases.numel()} {what}"
    return Check(theorem, claim, None, bool(cases.all()), detail)
