"""Perplexity under a lever, of text that nobody asked to change.

    exp( - sum_t log q(y_t | x, y_<t) / number of tokens )

with q the steered model, x the neutral prompts (without any, those that already show the behavior)
and y the unsteered model's own answers, sampled at temperature 1 with a fixed seed. For the unsteered
model itself that is the exponential of its entropy along them. A prompt lever changes x, never y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.levers.conversions.recovered import Lever, used
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.rows import PromptRow, lay_out
from trimtab.prompts.task.teacher import answers_as_ids, target_log_probs


@dataclass(frozen=True)
class Text:
    """Prompts with the tokens whose perplexity is read.

    Attributes:
        rows: prompts with their answers.
        tokens: of all answers.
    """

    rows: tuple[PromptRow, ...] = field(repr=False)
    tokens: int

    @classmethod
    def sampled(
        cls, lm: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int = 40, seed: int = 0
    ) -> Text:
        """Sample the unsteered model's answers to prompts at temperature 1."""
        answers = answers_as_ids(lm, None, prompts, max_new_tokens, 1.0, seed)
        rows = [row for row in lay_out(lm, prompts, targets=answers) if row.target]
        return cls(tuple(rows), sum(len(row.target) for row in rows))

    def perplexity(self, lm: LanguageModel, lever: Lever) -> float:
        """Return the perplexity under a lever, another model, or (None) the unsteered model.

        Infinite where a token has no probability left.
        """
        total = 0.0
        log_ps = target_log_probs(*used(lm, lever), self.rows)
        for row, log_p in zip(self.rows, log_ps, strict=True):
            total -= sum(float(log_p[t, token]) for t, token in enumerate(row.target))
        mean = total / max(1, self.tokens)
        return math.exp(mean) if mean < 700 else math.inf
