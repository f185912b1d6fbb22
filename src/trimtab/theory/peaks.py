"""Where each token's probability peaks under an exponential tilt, for whole vocabularies.

Under p_alpha(z) ~ p0(z) exp(alpha s_z) the peak of token z is the alpha at which E_alpha[s] = s_z.
Seen from the largest slope, with t = max s - s, that is y(alpha) = E_alpha[t] = t_z, where y falls
from E_0[t] to 0: differences of slopes are exact in floating point where slopes nearly tie, and the
negative side is the same with t = s - min s.

A Newton step for every token against every token would cost vocab^2 exponentials. Instead y is
tabulated together with its first three derivatives, which are cumulants of t, as a piecewise
polynomial of degree 7 in alpha, refined where tokens peak until it meets the next tabulated value;
tokens are then solved on the polynomials. Where y is too flat for that, one token holding almost
all probability, and in small vocabularies, the equation itself is solved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CELLS = 2**22  # numbers held in one float64 temporary, 32 MB
DIRECT = 2**18  # tokens times vocabulary up to which the equation itself is solved for every token
TOLERANCE = 1e-11  # of the table, relative to alpha, before its last halving
ROUNDING = 4e-15  # of y, relative


def row_peaks(log_p0: Tensor, slope: Tensor, wanted: Tensor) -> Tensor:
    """Return the alphas at which E_alpha[s] equals each of `wanted`, some of the row's slopes.

    Args:
        log_p0: float64 [vocab], finite.
        slope: float64 [vocab].
        wanted: float64 [m], each a value of `slope`.

    Returns:
        [m]; inf for the largest slope, -inf for the smallest, nan where all slopes are equal.
    """
    top, bottom = slope.max(), slope.min()
    result = torch.full_like(wanted, math.nan)
    if bool(top == bottom):
        return result
    result[wanted == top], result[wanted == bottom] = math.inf, -math.inf
    from_top, from_bottom = top - slope, slope - bottom
    p0 = log_p0.exp()
    for sign, distance, targets in (
        (1.0, from_top, top - wanted),
        (-1.0, from_bottom, wanted - bottom),
    ):
        here = (targets > 0) & (targets < (p0 * distance).sum())
        if bool(here.any()):
            levels, back = torch.unique(targets[here], return_inverse=True)
            result[here] = sign * _side(log_p0, distance, levels)[back]
    inner = (wanted != top) & (wanted != bottom)
    result[inner & result.isnan()] = 0.0  # at the mean of both sides, to the last bit
    return result


def _side(log_p0: Tensor, distance: Tensor, levels: Tensor) -> Tensor:
    """Solve y(alpha) = level for rising levels [m] within (0, y(0)); alpha falls along them."""
    knots, data = _bracket(log_p0, distance, levels[0])
    if levels.shape[0] * distance.shape[0] <= DIRECT:
        alpha = _solve(log_p0, distance, levels, 0.5 * knots[-1].expand_as(levels), knots[-1])
    else:
        knots, data = _refine(log_p0, distance, levels, knots, data)
        alpha, slack = _read(levels, knots, data)
        flat = slack > TOLERANCE * torch.maximum(alpha, 0.1 * knots[1])
        if bool(flat.any()):
            alpha[flat] = _solve(log_p0, distance, levels[flat], alpha[flat], knots[-1])
    # Rounding must not swap neighbors: alpha falls as the level rises.
    return alpha.flip(0).cummax(0).values.flip(0)


def _bracket(log_p0: Tensor, distance: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return knots 0, h, 2h, 4h, ... until y is at most `least`, and y with its derivatives there.

    Shapes [knots] and [knots, 4].
    """
    knots = torch.zeros(1, dtype=torch.float64, device=distance.device)
    data = _cumulants(log_p0, distance, knots)
    step = 0.25 / torch.maximum(data[0, 1].neg().sqrt(), 1e-8 * distance.max())
    while bool(data[-1, 0] > least):
        more = step * torch.exp2(torch.arange(8, dtype=torch.float64, device=step.device))
        knots = torch.cat([knots, more])
        data = torch.cat([data, _cumulants(log_p0, distance, more)])
        step = 2 * knots[-1]
    used = int((data[:, 0] > least).sum()) + 1
    return knots[:used], data[:used]


def _cumulants(log_p0: Tensor, distance: Tensor, alpha: Tensor) -> Tensor:
    """Return y, y', y'', y''' at alpha [k] as [k, 4]: the cumulants of t with alternating sign."""
    parts: list[Tensor] = []
    for some in alpha.split(max(1, CELLS // distance.shape[0])):
        weights = torch.softmax(log_p0 - some[:, None] * distance, dim=-1)
        mean = weights @ distance
        around = distance - mean[:, None]
        moment = weights * around
        # E[t - mean] is rounding only; taken off, the mean is right to the last bits.
        mean = mean + moment.sum(-1)
        second = (moment := moment * around).sum(-1)
        third = (moment := moment * around).sum(-1)
        fourth = (moment * around).sum(-1) - 3 * second.square()
        parts.append(torch.stack([mean, -second, third, -fourth], dim=-1))
    return torch.cat(parts)


def _polynomials(knots: Tensor, data: Tensor) -> Tensor:
    """Return coefficients [panels, 8] in u = (alpha - left) / width that match both ends' data."""
    scale = (knots[1:] - knots[:-1])[:, None] ** torch.arange(4, device=knots.device)
    left, right = data[:-1] * scale, data[1:] * scale
    factorials = torch.tensor([1.0, 1.0, 2.0, 6.0], dtype=torch.float64, device=knots.device)
    low = left / factorials
    # derivative j of u^i at u = 1 is i (i - 1) ... (i - j + 1)
    falling = torch.tensor(
        [[math.perm(i, j) for i in range(8)] for j in range(4)], dtype=torch.float64
    ).to(knots.device)
    high = torch.linalg.solve(falling[:, 4:], (right - low @ falling[:, :4].T).T).T
    return torch.cat([low, high], dim=-1)


def _evaluate(coefficients: Tensor, u: Tensor) -> Tensor:
    value = coefficients[..., -1]
    for power in range(6, -1, -1):
        value = value * u + coefficients[..., power]
    return value


def _panel_of(levels: Tensor, y: Tensor) -> Tensor:
    falling = -y.cummin(0).values
    index = torch.searchsorted(falling.contiguous(), -levels, right=True) - 1
    return index.clamp(0, y.shape[0] - 2)


def _refine(
    log_p0: Tensor, distance: Tensor, levels: Tensor, knots: Tensor, data: Tensor
) -> tuple[Tensor, Tensor]:
    """Halve the panels in which levels lie until their polynomials meet y at the middle."""
    done = torch.zeros_like(knots, dtype=torch.bool)  # of the panel to the right of each knot
    for _ in range(40):
        occupied = torch.zeros_like(done)
        occupied[_panel_of(levels, data[:, 0])] = True
        split = (occupied & ~done).nonzero().flatten()
        if split.numel() == 0:
            break
        middle = 0.5 * (knots[split] + knots[split + 1])
        fresh = _cumulants(log_p0, distance, middle)
        half = torch.full_like(middle, 0.5)
        error = (_evaluate(_polynomials(knots, data)[split], half) - fresh[:, 0]).abs()
        allowed = torch.maximum(
            TOLERANCE * middle * fresh[:, 1].abs(), 10 * ROUNDING * fresh[:, 0].abs()
        )
        done[split] = error <= allowed
        knots, order = torch.cat([knots, middle]).sort()
        data = torch.cat([data, fresh])[order]
        done = torch.cat([done, done[split]])[order]
    return knots, data


def _read(levels: Tensor, knots: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the tabulated y for each level by bisection; also what rounding of y does to alpha."""
    panel = _panel_of(levels, data[:, 0])
    coefficients = _polynomials(knots, data)[panel]
    low, high = torch.zeros_like(levels), torch.ones_like(levels)
    for _ in range(54):
        middle = 0.5 * (low + high)
        above = _evaluate(coefficients, middle) > levels
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    width = knots[panel + 1] - knots[panel]
    flattest = torch.minimum(data[panel, 1].abs(), data[panel + 1, 1].abs())
    return knots[panel] + width * high, ROUNDING * levels / flattest


def _solve(log_p0: Tensor, distance: Tensor, levels: Tensor, start: Tensor, most: Tensor) -> Tensor:
    """Solve E_alpha[t - level] = 0 on [0, most] by Newton steps kept inside a shrinking bracket."""
    parts: list[Tensor] = []
    size = max(1, CELLS // distance.shape[0])
    for level, alpha in zip(levels.split(size), start.split(size), strict=True):
        low, high = torch.zeros_like(alpha), most.expand_as(alpha)
        for _ in range(200):
            weights = torch.softmax(log_p0 - alpha[:, None] * distance, dim=-1)
            offset = distance - level[:, None]
            excess = (weights * offset).sum(-1)
            variance = (weights * (offset - excess[:, None]).square()).sum(-1)
            low = torch.where(excess > 0, alpha, low)
            high = torch.where(excess > 0, high, alpha)
            newton = alpha + excess / variance
            # A step beyond the bracket, or none at all (0 / 0), is replaced by halving.
            inside = (newton > low) & (newton < high)
            following = torch.where(inside, newton, 0.5 * (low + high))
            settled = (following - alpha).abs() <= 2e-16 * following.abs()
            alpha = torch.where(excess == 0, alpha, following)
            if bool((settled | (excess == 0)).all()):
                break
        parts.append(alpha)
    return torch.cat(parts)
