"""A strength for each prompt: as much as the prompt needs, and no more than the window allows.

One derivative at the tuned strength m gives the log-odds g_i of the wanted words after every prompt,
and their slope g_i'. A step of Newton's method towards a common goal g* is m_i = m + (g* - g_i) / g_i',
cut to between 0 and the window's far end. Prompts that already show the behavior are left nearly
alone, which is where damage is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import Summary, mean, summary
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import decisions
from trimtab.steering.vector import VectorSteering
from trimtab.strength.screen import Odds


@dataclass(frozen=True, kw_only=True)
class AdaptiveResult(Summary):
    """Per-prompt strengths measured on the prompts that the fixed strength was measured on.

    Attributes:
        goal: the log-odds g* that every prompt is brought to, nats.
        strengths: one per scored prompt.
        mean: of them.
        damage_mean_strength: mean strength on the prompts of the damage.
    """

    goal: float
    strengths: tuple[float, ...]
    mean: float
    damage_mean_strength: float


@dataclass(frozen=True)
class _Rows:
    """A vector with a strength for each prompt, as one switch."""

    vector: VectorSteering
    strengths: tuple[float, ...]

    def on(self, lm: LanguageModel) -> AbstractContextManager[None]:
        return self.vector.on(lm, row_strengths=self.strengths)


def adaptive_strengths(
    lm: LanguageModel,
    vector: VectorSteering,
    odds: Odds,
    prompts: Sequence[Prompt],
    goal: float,
    window: tuple[float, float],
) -> tuple[float, ...]:
    """Return one strength per prompt, for `vector.on(lm, row_strengths=...)`.

    The step is taken from the vector's own strength to the goal, log-odds in nats; the window is the
    (smallest, largest) magnitude of m, (0, window's far end) in `tune`.
    """
    found = decisions(lm, vector, prompts, at=vector.strength)
    logits, slope = found.tilt.log_p0.float(), found.tilt.slope.float()
    levels, rates = odds(logits), odds.rate(logits, slope)
    side, m = 1 if vector.strength >= 0 else -1, abs(vector.strength)
    strengths = []
    for level, rate in zip(levels.tolist(), (side * rates).tolist(), strict=True):
        step = (goal - level) / rate if rate > 0 else 0.0  # more would not raise the odds
        strengths.append(side * min(max(m + step, window[0]), window[1]))
    return tuple(strengths)


def common_goal(
    lm: LanguageModel, vector: VectorSteering, odds: Odds, prompts: Sequence[Prompt]
) -> float:
    """Return the median log-odds of prompts under the vector: what the fixed strength brings about."""
    with vector.on(lm):
        return float(odds(lm.next_logits(list(prompts))).median())


def measure_adaptive(
    evaluator: Evaluator,
    vector: VectorSteering,
    odds: Odds,
    goal: float,
    window: tuple[float, float],
    seed: int,
) -> AdaptiveResult:
    """Answer the evaluator's prompts at a strength each, and read the damage in the same way."""
    lm, side = evaluator.lm, 1 if vector.strength >= 0 else -1
    prompts, damaged = evaluator.prompts(evaluator.scored(side)), evaluator.damaged(side)
    strengths = adaptive_strengths(lm, vector, odds, prompts, goal, window)
    with vector.on(lm, row_strengths=strengths):
        answers = lm.generate(list(prompts), max_new_tokens=evaluator.max_new_tokens)
    own = adaptive_strengths(lm, vector, odds, evaluator.prompts(damaged), goal, window)
    damage = evaluator.reference(damaged).kl(_Rows(vector, own))
    return AdaptiveResult(
        **vars(replace(summary(evaluator.evaluation(side, answers, damage), seed), samples=())),
        goal=goal,
        strengths=strengths,
        mean=mean(strengths),
        damage_mean_strength=mean(own),
    )
