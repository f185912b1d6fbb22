"""Where the probability of a set of tokens is highest under a tilt, and where it reaches a target.

The log-odds of a set C move with E_alpha[s | C] - E_alpha[s | not C]. Unlike a single token's
log-probability they need not be concave, so strengths are laid out on a grid up to the point beyond
which they provably move one way, and the point that matters is then refined by halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.theory.tilt import Tilt, Tokens

GRID = 64  # steps between 0 and the end, finer near 0
STEPS = 100
DOUBLINGS = 1000


def concept_peak(tilt: Tilt, tokens: Tokens, sign: int = 1) -> Tensor:
    """Return the alpha [n], on the side of `sign`, at which P(C) is highest.

    It is sign * inf where the extreme slope belongs to C, for then P(C) goes to 1, and 0 where
    P(C) is never again what it is unsteered. Elsewhere E_alpha[s | C] = E_alpha[s | not C]
    holds there. A set may have several bumps; the highest seen on a grid of strengths is
    refined.
    """
    mask = tilt.mask(tokens)
    grid = _grid(tilt, _reach(tilt, mask, sign))
    odds = tilt.concept_log_odds(mask, sign * grid)
    best = odds.argmax(dim=0, keepdim=True)

    def rate(alphas: Tensor) -> Tensor:
        return sign * tilt.concept_slope(mask, sign * alphas)

    rising = rate(grid.gather(0, best)[0]) > 0  # the top lies after the best point, or before it
    low = grid.gather(0, (best - 1 + rising.long()).clamp_min(0))[0]
    high = grid.gather(0, (best + rising.long()).clamp_max(GRID))[0]
    found = _crossing(rate, low, high)
    inside, outside = _extremes(tilt, mask, sign)
    at_limit = (inside == outside) & (
        _limit_log_odds(tilt, mask, sign) >= tilt.concept_log_odds(mask, sign * found)
    )
    return sign * torch.where((inside > outside) | at_limit, math.inf, found) + 0.0


def window(
    tilt: Tilt, tokens: Tokens, target: float, kappa: float, sign: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (low, high) [n]: the first alpha with P(C) >= target, the last with KL <= kappa.

    `low` is nan where P(C) never reaches the target, whatever the strength. The window is empty
    where |low| > |high|; the target lies within (0, 1).
    """
    mask, goal = tilt.mask(tokens), math.log(target) - math.log1p(-target)

    def missing(alphas: Tensor) -> Tensor:
        return goal - tilt.concept_log_odds(mask, sign * alphas)

    peak = concept_peak(tilt, mask, sign).abs()
    endless = peak.isinf()
    upper = torch.where(endless, _reach(tilt, mask, sign), peak)
    endless &= _limit_log_odds(tilt, mask, sign) >= goal
    for _ in range(DOUBLINGS):
        if not bool((more := endless & (missing(upper) > 0)).any()):
            break
        upper = torch.where(more, 2 * upper, upper)
    grid = _grid(tilt, upper)
    reached = missing(grid) <= 0
    first = reached.long().argmax(dim=0, keepdim=True)
    before = grid.gather(0, (first - 1).clamp_min(0))[0]
    crossing = _crossing(missing, before, grid.gather(0, first)[0])
    crossing = torch.where(first[0] == 0, 0.0, crossing)
    low = sign * torch.where(reached.any(dim=0), crossing, math.nan) + 0.0
    return low, tilt.strength_for_kl(kappa, sign)


def _reach(tilt: Tilt, mask: Tensor, sign: int) -> Tensor:
    """Return a strength [n] beyond which P(C) moves one way for good.

    E_alpha[s | A] rises with alpha, so once it passes the largest slope of the other set it stays
    ahead. Where the two extremes tie, the strength at which everything else is rounding.
    """
    inside, outside = _extremes(tilt, mask, sign)
    behind_top = torch.maximum(inside, outside)[:, None] - sign * tilt.slope
    tied, extreme = inside == outside, behind_top == 0

    def undecided(alpha: Tensor) -> Tensor:
        log_p = tilt.log_probs(sign * alpha)
        rest = log_p.exp().masked_fill(extreme, 0.0).sum(-1)
        overtaken = torch.zeros_like(tied)
        for own in (mask, ~mask):
            p = torch.softmax(log_p.masked_fill(~own, -math.inf), dim=-1)
            overtaken |= (p * behind_top).sum(-1) < behind_top[:, ~own].min(-1).values
        return torch.where(tied, rest > 1e-16, ~overtaken)

    alpha = _unit(tilt)
    for _ in range(DOUBLINGS):
        if not bool((more := undecided(alpha)).any()):
            break
        alpha = torch.where(more, 2 * alpha, alpha)
    return alpha


def _extremes(tilt: Tilt, mask: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    signed = sign * tilt.slope
    return signed[:, mask].max(-1).values, signed[:, ~mask].max(-1).values


def _limit_log_odds(tilt: Tilt, mask: Tensor, sign: int) -> Tensor:
    """Return the log-odds of C [n] at infinite strength: those of the extreme tokens at 0."""
    signed = sign * tilt.slope
    extreme = signed == signed.max(dim=-1, keepdim=True).values
    inside = tilt.log_p0.masked_fill(~(extreme & mask), -math.inf).logsumexp(-1)
    return inside - tilt.log_p0.masked_fill(~(extreme & ~mask), -math.inf).logsumexp(-1)


def _unit(tilt: Tilt) -> Tensor:
    variance = tilt.variance(0.0)
    return torch.where(variance > 0, variance, 1.0).rsqrt()


def _grid(tilt: Tilt, upper: Tensor) -> Tensor:
    """Return GRID + 1 strengths from 0 to upper [n], finer near 0, [GRID + 1, n]."""
    unit = _unit(tilt)
    share = torch.linspace(0, 1, GRID + 1, dtype=torch.float64, device=upper.device)[:, None]
    grid = unit * torch.sinh(share * torch.asinh(upper / unit))
    grid[-1] = upper
    return grid


def _crossing(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return where a function above 0 at low [n] and not at high [n] falls to 0 in between.

    False position with the Illinois weights (Dowell and Jarratt 1971), every fourth step a halving.
    """
    above, below = function(low), function(high)
    for step in range(STEPS):
        middle = 0.5 * (low + high)
        secant = low + (high - low) * above / (above - below)
        inside = (secant > low) & (secant < high) & (step % 4 < 3)
        here = torch.where(inside, secant, middle)
        value = function(here)
        over = value > 0
        # The end that stays counts half, or the steps would creep up from one side for ever.
        above, below = torch.where(over, value, 0.5 * above), torch.where(over, 0.5 * below, value)
        low, high = torch.where(over, here, low), torch.where(over, high, here)
        if bool((high - low <= 2e-16 * high).all()) or not bool((value != 0).any()):
            break
    return high
