"""The first look of `tune`: which layers and scope move the behavior most for the damage allowed.

For every candidate one derivative gives the strength m_kappa at which the 95th percentile of damage
should reach the budget; around it a handful of strengths are measured on a few prompts, damage
along answers and the log-odds of the wanted words at the first answer position. The candidate's
figure is what those odds gain at the strength where measured damage meets the budget, found between those strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import summarize
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.readout import readout_tokens
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import answer_variance
from trimtab.passes.fan import Fan
from trimtab.steering.layers import default_layers
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

SCOPES = ("all", "last", "post_instruction")
ENOUGH = 3.0  # nats on the wanted side: a prompt that is 95 % decided cannot be moved much further
FACTORS = (0.4, 1.0, 2.5, 6.0)  # of m_kappa; a leading order, which may be off this far


@dataclass(frozen=True)
class Candidate:
    """One place to steer, as the first look saw it.

    Attributes:
        layers: steered layers.
        scope: steered tokens.
        predicted: m_kappa, where p95 damage should reach the budget.
        limit: m where measured p95 damage reaches it; the largest strength tried if it never does.
        gain: log-odds of the wanted words gained there, nats, no prompt counting beyond `ENOUGH`; the
            mean over prompts.
        refused: why this place cannot be steered; empty when it can.
    """

    layers: tuple[int, ...]
    scope: str
    predicted: float
    limit: float
    gain: float
    refused: str = ""


class Odds:
    """How far next-token logits `[..., vocab]` speak for the wanted side, in nats.

    With readout words, the log-odds of their tokens against all others, the law's logit F_C: a token
    of neither side counts against the behavior, since greedy answers open with it. Without words,
    how much better the mean first-token distribution of unsteered prompts of the wanted side is
    expected than that of the other side: sum_z (P_wanted(z) - P_other(z)) log p(z).
    """

    def __init__(self, lm: LanguageModel, behavior: Behavior, sign: int) -> None:
        words = None if behavior.readout is None else readout_tokens(lm, behavior)
        self.tokens = () if words is None else (words.toward if sign > 0 else words.away)
        self.contrast = torch.empty(0)
        if not self.tokens:
            toward, away = (
                lm.next_logits([e.prompt for e in side]).softmax(-1).mean(0)
                for side in (behavior.toward, behavior.away)
            )
            self.contrast = sign * (toward - away)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return `[...]`."""
        if not self.tokens:
            return logits.float().log_softmax(-1) @ self.contrast
        return logits[..., list(self.tokens)].float().logsumexp(-1) - self._others(
            logits.float()
        ).logsumexp(-1)

    def rate(self, logits: Tensor, slope: Tensor) -> Tensor:
        """Return d odds / d m `[...]` from logits and their slope `[..., vocab]`."""
        if not self.tokens:
            return slope @ self.contrast  # the contrast sums to 0: the normalizer drops out
        chosen = list(self.tokens)
        inside = (logits[..., chosen].softmax(-1) * slope[..., chosen]).sum(-1)
        return inside - (self._others(logits).softmax(-1) * slope).sum(-1)

    def _others(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(self.tokens), -torch.inf)


def candidates(
    lm: LanguageModel,
    vector: VectorSteering,
    layers: Sequence[Sequence[int]] | None,
    scopes: Sequence[str] | None,
) -> list[VectorSteering]:
    """Return the vector at every place to look at: as it is, single layers, the default range.

    Raises:
        TrimtabError: for no place at all, an unknown scope or a layer without a direction.
    """
    known = [layer for layer in sorted(vector.directions) if layer in vector.scales]
    if layers is None:
        band = tuple(layer for layer in default_layers(lm.n_layers) if layer in known)
        sets = [vector.layers, *[(layer,) for layer in known], *([band] if band else [])]
    else:
        sets = [tuple(chosen) for chosen in layers]
    named = [str(vector.scope), *SCOPES] if scopes is None else list(scopes)
    places = dict.fromkeys((at, str(Scope.parse(name))) for at in sets for name in named)
    if not places:
        raise TrimtabError(
            asked="to look for a place to steer",
            found=f"{len(sets)} layer sets and {len(named)} scopes",
            advice="give at least one of each, or None for the usual ones",
        )
    return [vector.select(layers=at, scope=scope) for at, scope in places]


class Screen:
    """The first look, at a few prompts of the behavior with their unsteered answers."""

    def __init__(self, evaluator: Evaluator, odds: Odds, budget: float, sign: int) -> None:
        self.lm, self.odds, self.budget, self.sign = evaluator.lm, odds, budget, sign
        shown, scored = evaluator.damaged(sign), evaluator.prompts(evaluator.scored(sign))
        self.damaged, self.answers = evaluator.prompts(shown), evaluator.unsteered(shown)
        self.reference = evaluator.reference(shown)
        self.encoded = [self.lm.encode(prompt) for prompt in scored]
        self.before = self._moved(self.lm.next_logits(list(scored)))

    def look(self, vector: VectorSteering) -> Candidate:
        """Look at a vector at one place; the figures of one that cannot be steered say why."""
        at, scope = vector.layers, str(vector.scope)
        try:
            fan = Fan(self.lm, vector, self.encoded)
            variance = torch.cat(answer_variance(self.lm, vector, self.damaged, self.answers))
        except TrimtabError as error:  # such as a scope that these prompts have no tokens for
            return Candidate(at, scope, 0.0, 0.0, -math.inf, error.found)
        spread = float(variance.quantile(0.95))
        if not spread > 0:
            return Candidate(at, scope, math.inf, 0.0, -math.inf, "it moves nothing")
        predicted = math.sqrt(2 * self.budget / spread)
        strengths = [self.sign * predicted * factor for factor in FACTORS]
        damage = [summarize(tokens).p95 for tokens in self.reference.kl_many(vector, strengths)]
        gains = self._moved(fan.next_logits(strengths)) - self.before
        limit = crossing([abs(m) for m in strengths], damage, self.budget)
        gain = best_within([abs(m) for m in strengths], gains.tolist(), limit)
        return Candidate(at, scope, predicted, limit, gain)

    def _moved(self, logits: Tensor) -> Tensor:
        return self.odds(logits).clamp_max(ENOUGH).mean(-1)


def crossing(strengths: Sequence[float], damage: Sequence[float], budget: float) -> float:
    """Return where damage first exceeds the budget, by logarithmic interpolation.

    Below the first strength KL is taken to fall as m^2; if no damage exceeds the budget it is the
    last strength.
    """
    m0, d0 = strengths[0], damage[0]
    if d0 > budget:
        return m0 * math.sqrt(budget / d0)
    for m1, d1 in zip(strengths[1:], damage[1:], strict=True):
        if d1 > budget:
            if not math.isfinite(d1) or d0 <= 0:
                return m0
            share = math.log(budget / d0) / math.log(d1 / d0)
            return math.exp(math.log(m0) + share * (math.log(m1) - math.log(m0)))
        m0, d0 = m1, d1
    return strengths[-1]


def best_within(strengths: Sequence[float], gains: Sequence[float], limit: float) -> float:
    """Return the largest gain at strengths up to `limit`, which itself is interpolated; 0 at m = 0."""
    at, gained = [0.0, *strengths], [0.0, *gains]
    inside = [gain for m, gain in zip(at, gained, strict=True) if m <= limit]
    return max(*inside, float(np.interp(limit, at, gained)))
