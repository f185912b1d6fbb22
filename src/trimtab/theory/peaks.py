"""Where each token's probability peaks under an exponential tilt, for whole vocabularies.

Under p_alpha(z) ~ p0(z) exp(alpha s_z) the peak of token z is the alpha at which E_alpha[s] = s_z.
Seen from the largest slope, with t = max s - s, that is y(alpha) = E_alpha[t] = t_z, where y falls
from E_0[t] to 0: differences of slopes are exact in floating point where slopes nearly tie, and the
negative side is the same with t = s - min s.

A step for every token against every token would cost vocab^2 exponentials. Instead y, y' and y'',
which are cumulants of t, are tabulated on a grid that is fine near 0; in a token's panel the
polynomial of degree 5 through them is solved, to 1e-6 of alpha or better unless y is flat there. In
small vocabularies the equation itself is solved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CELLS = 2**22  # numbers held in one float64 temporary, 32 MB
DIRECT = 2**18  # tokens times vocabulary up to which the equation itself is solved for every token
GRID = 192
NEWTON = 2  # steps: each squares an error that the secant leaves at about a hundredth


def row_peaks(log_p0: Tensor, slope: Tensor) -> Tensor:
    """Return the alphas at which E_alpha[s] equals each slope of one context, float64 [vocab].

    inf for the largest slope, -inf for the smallest, nan where all slopes are equal.
    """
    top, bottom = slope.max(), slope.min()
    if bool(top == bottom):
        return torch.full_like(slope, math.nan)
    result = torch.zeros_like(slope)  # also at the mean of both sides, to the last bit
    result[slope == top], result[slope == bottom] = math.inf, -math.inf
    for sign, distance in ((1.0, top - slope), (-1.0, slope - bottom)):
        here = (distance > 0) & (distance < log_p0.exp() @ distance)
        if bool(here.any()):
            levels, back = torch.unique(distance[here], return_inverse=True)
            reach = 1 / distance.max()
            while bool(torch.softmax(log_p0 - reach * distance, dim=-1) @ distance > levels[0]):
                reach = 2 * reach
            solve = _solve if levels.numel() * distance.numel() <= DIRECT else _read
            alpha = solve(log_p0, distance, levels, reach)
            # Rounding must not swap neighbors: alpha falls as the level rises.
            result[here] = sign * alpha.flip(0).cummax(0).values.flip(0)[back]
    return result


def _read(log_p0: Tensor, distance: Tensor, levels: Tensor, reach: Tensor) -> Tensor:
    """Solve y(alpha) = level for rising levels [m] within (0, y(0)) on a table from 0 to `reach`."""
    unit = 1 / distance.max()
    share = torch.linspace(0, 1, GRID, dtype=torch.float64, device=distance.device)
    grid = unit * torch.sinh(share * torch.asinh(reach / unit))
    powers = torch.stack([distance, distance**2, distance**3], dim=-1)
    some = grid[:, None].split(max(1, CELLS // distance.shape[0]))
    moments = [torch.softmax(log_p0 - alpha * distance, dim=-1) @ powers for alpha in some]
    y, square, cube = torch.cat(moments).T
    first, second = y**2 - square, cube - 3 * y * square + 2 * y**3
    panel = torch.searchsorted(-y.cummin(0).values, -levels, right=True) - 1
    panel = panel.clamp(0, GRID - 2)
    low, high = grid[panel], grid[panel + 1]
    width, rest, fall = high - low, y[panel] - levels, y[panel + 1] - y[panel]
    d0, d1 = first[panel] * width, first[panel + 1] * width
    s0, s1 = second[panel] * width**2 / 2, second[panel + 1] * width**2 / 2
    # Hermite's polynomial in u = (alpha - low) / width, from the highest power down.
    coefficients = (
        6 * fall - 3 * (d0 + d1) - s0 + s1,
        -15 * fall + 8 * d0 + 7 * d1 + 3 * s0 - 2 * s1,
        10 * fall - 6 * d0 - 4 * d1 - 3 * s0 + s1,
        s0,
        d0,
        rest,
    )
    u = -rest / fall
    for _ in range(NEWTON):
        value, slope = torch.zeros_like(u), torch.zeros_like(u)
        for coefficient in coefficients:
            value, slope = value * u + coefficient, slope * u + value
        u = (u - value / slope).clamp(0, 1)
    return low + width * u.nan_to_num(0.5)


def _solve(log_p0: Tensor, distance: Tensor, levels: Tensor, reach: Tensor) -> Tensor:
    """Solve E_alpha[t - level] = 0 on [0, reach] by Newton steps kept inside a shrinking bracket."""
    offset = distance - levels[:, None]
    low, high = torch.zeros_like(levels), reach.expand_as(levels)
    alpha = 0.5 * high
    for _ in range(100):
        weights = torch.softmax(log_p0 - alpha[:, None] * distance, dim=-1)
        excess = (weights * offset).sum(-1)
        variance = (weights * (offset - excess[:, None]).square()).sum(-1)
        low, high = torch.where(excess > 0, alpha, low), torch.where(excess > 0, high, alpha)
        step = alpha + excess / variance
        # A step beyond the bracket, or none at all (0 / 0), is replaced by halving.
        following = torch.where((step > low) & (step < high), step, 0.5 * (low + high))
        alpha = torch.where(excess == 0, alpha, following)
        if bool((high - low <= 2e-16 * high).all()):
            break
    return alpha
