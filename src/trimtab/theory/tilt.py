"""The exponential tilt: what steering does to next-token probabilities if logits move on a line.

With s = d logits / d alpha at alpha = 0, p_alpha(z) = p0(z) exp(alpha s_z - psi(alpha)) and
psi(alpha) = log E_p0[exp(alpha s)]. This is exact where logits are linear in alpha (the setting of
Taimeskhanov, Vaiter and Garreau, arXiv 2602.02712) and the leading order of any real model. psi is
convex, psi' = E_alpha[s] and psi'' = Var_alpha(s), from which everything here follows. Adding a
constant to the slopes of a row changes psi and psi' and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.theory.peaks import CELLS, row_peaks

Alpha = float | Tensor
Tokens = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Tilt:
    """Next-token distributions of n contexts and how each token's logit moves with strength.

    An alpha may be a float, a tensor [n] with one strength per context, or a tensor [k, n] ([k, 1]
    for the same k strengths everywhere); results then have shape [n], [n] and [k, n]; nan
    gives nan. Strengths that are returned carry their sign: with sign = -1 they are negative.

    Attributes:
        log_p0: log-probabilities at alpha = 0, [n, vocab], kept in float64 and normalized here, so
            that logits will do.
        slope: s, [n, vocab], nats per unit of alpha, kept in float64.
    """

    log_p0: Tensor
    slope: Tensor

    def __post_init__(self) -> None:
        log_p0, slope = _float64(self.log_p0), _float64(self.slope)
        assert log_p0.ndim == 2 and log_p0.shape == slope.shape
        assert bool(log_p0.isfinite().all()) and bool(slope.isfinite().all())
        object.__setattr__(self, "log_p0", torch.log_softmax(log_p0, dim=-1))
        object.__setattr__(self, "slope", slope)

    def log_probs(self, alpha: Alpha) -> Tensor:
        """Return log p_alpha, [..., n, vocab]."""
        return torch.log_softmax(self._weights(self._alphas(alpha)), dim=-1)

    def variance(self, alpha: Alpha) -> Tensor:
        """Return psi''(alpha) = Var_alpha(s), [..., n]."""

        def spread(alphas: Tensor) -> Tensor:
            p = torch.softmax(self._weights(alphas), dim=-1)
            around = self._centered - (p * self._centered).sum(-1, keepdim=True)
            return (p * around.square()).sum(-1)

        return self._each(alpha, spread)

    def kl(self, alpha: Alpha) -> Tensor:
        """Return KL(p0 || p_alpha) = psi(alpha) - alpha E_0[s] in nats, [..., n]."""
        return self._psi(alpha).clamp_min(0.0)

    def quadratic_kl(self, alpha: Alpha) -> Tensor:
        """Return alpha^2 / 2 Var_0(s), its leading order, [..., n]."""
        return 0.5 * self._alphas(alpha).square() * self.variance(0.0)

    def strength_for_kl(self, kappa: float, sign: int = 1) -> Tensor:
        """Return the alpha [n] on the side of `sign` at which KL(p0 || p_alpha) is `kappa` nats.

        It is +-inf where no slope differs from the others, since nothing ever moves there.
        """
        assert 0 <= kappa < math.inf
        span = self.slope.max(-1).values - self.slope.min(-1).values
        moves, variance = span > 0, self.variance(0.0)
        alpha = torch.where(variance > 0, (2 * kappa / variance).sqrt(), 1 / span)
        alpha = torch.where(moves, alpha, 0.0)
        if kappa == 0:
            return torch.zeros_like(alpha)
        while bool((short := moves & (self._psi(sign * alpha) < kappa)).any()):
            alpha = torch.where(short, 2 * alpha, alpha)
        # psi is convex: from a point beyond the root, Newton's steps come down to it monotonically.
        for _ in range(100):
            excess = self._psi(sign * alpha) - kappa
            rate = sign * self._each(sign * alpha, self._tilted_mean)
            lower = alpha - torch.where(moves, excess / rate, 0.0)
            falls = moves & (lower < alpha * (1 - 1e-15))
            if not bool(falls.any()):
                break
            alpha = torch.where(falls, lower, alpha)
        return sign * torch.where(moves, alpha, math.inf)

    def peaks(self) -> Tensor:
        """Return the alpha of every token's one bump, where E_alpha[s] = s_z, [n, vocab].

        log p_alpha(z) is strictly concave in alpha, so there is one; it lies at alpha > 0 exactly
        where s_z > E_0[s], and peaks are ordered by s. Tokens with the largest slope of their
        context never stop rising (inf), those with the smallest always fall (-inf); nan where all
        slopes are equal.

        """
        return torch.stack(list(map(row_peaks, self.log_p0, self.slope)))

    def collapse_token(self, sign: int = 1) -> Tensor:
        """Return the token [n] whose probability goes to 1 as alpha goes to sign * infinity.

        Of several with the same extreme slope, the likeliest: they keep their ratios.
        """
        signed = sign * self.slope
        extreme = signed == signed.max(dim=-1, keepdim=True).values
        return self.log_p0.masked_fill(~extreme, -math.inf).argmax(dim=-1)

    def concept_log_odds(self, tokens: Tokens, alpha: Alpha) -> Tensor:
        """Return logit P(C) = logit at 0 + K_C(alpha) - K_notC(alpha), [..., n].

        K_A(alpha) = log E_0[exp(alpha s) | A]; C is ids or a mask [vocab], neither none nor all.
        """
        (log_in, slope_in), (log_out, slope_out) = self._halves(self.mask(tokens))

        def odds(alphas: Tensor) -> Tensor:
            inside = (log_in + alphas[..., None] * slope_in).logsumexp(-1)
            return inside - (log_out + alphas[..., None] * slope_out).logsumexp(-1)

        return self._each(alpha, odds)

    def concept_probability(self, tokens: Tokens, alpha: Alpha) -> Tensor:
        """Return the mass of a set of tokens, P_alpha(C), [..., n]."""
        return torch.sigmoid(self.concept_log_odds(tokens, alpha))

    def concept_slope(self, tokens: Tokens, alpha: Alpha) -> Tensor:
        """Return E_alpha[s | C] - E_alpha[s | not C], the derivative of the log-odds, [..., n]."""
        (log_in, slope_in), (log_out, slope_out) = self._halves(self.mask(tokens))

        def difference(alphas: Tensor) -> Tensor:
            inside = torch.softmax(log_in + alphas[..., None] * slope_in, dim=-1)
            outside = torch.softmax(log_out + alphas[..., None] * slope_out, dim=-1)
            return (inside * slope_in).sum(-1) - (outside * slope_out).sum(-1)

        return self._each(alpha, difference)

    @cached_property
    def _centered(self) -> Tensor:
        # Roughly first: a large constant in the slopes would cost their digits in the average.
        rough = self.slope - self.slope.mean(dim=-1, keepdim=True)
        return rough - (self.log_p0.exp() * rough).sum(-1, keepdim=True)

    def _alphas(self, alpha: Alpha) -> Tensor:
        """Bring strengths to shape [..., n]."""
        given = torch.as_tensor(alpha, dtype=self.slope.dtype, device=self.slope.device)
        assert not bool(given.isinf().any())  # 0 * inf is no number
        return given.expand(*given.shape[:-1], self.slope.shape[0])

    def _each(self, alpha: Alpha, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of alphas [k, n] with values [k, n], a few strengths at a time."""
        alphas = self._alphas(alpha)
        rows = alphas.reshape(-1, alphas.shape[-1])
        size = max(1, CELLS // self.slope.numel())
        return torch.cat([function(part) for part in rows.split(size)]).reshape(alphas.shape)

    def _weights(self, alphas: Tensor) -> Tensor:
        return self.log_p0 + alphas[..., None] * self._centered

    def _psi(self, alpha: Alpha) -> Tensor:
        return self._each(alpha, lambda alphas: self._weights(alphas).logsumexp(-1))

    def _tilted_mean(self, alphas: Tensor) -> Tensor:
        return (torch.softmax(self._weights(alphas), dim=-1) * self._centered).sum(-1)

    def _halves(self, mask: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return log p0 and s of the tokens in a set, and of those outside."""
        inside, outside = ((self.log_p0[:, m], self._centered[:, m]) for m in (mask, ~mask))
        return inside, outside

    def mask(self, tokens: Tokens) -> Tensor:
        """Return a set of tokens, ids or a mask, as a mask [vocab]; neither none nor all."""
        mask = torch.zeros(self.slope.shape[1], dtype=torch.bool, device=self.slope.device)
        mask[torch.as_tensor(tokens, device=mask.device)] = True
        assert bool(mask.any()) and not bool(mask.all())
        return mask


def _float64(values: Tensor) -> Tensor:
    values = values.detach()
    # Apple's GPUs have no float64.
    return (values.cpu() if values.device.type == "mps" else values).to(torch.float64)
