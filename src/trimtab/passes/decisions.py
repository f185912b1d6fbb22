"""How the first answer position begins to move, and how much the answer's tokens do: slopes as tilts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.slope import slopes
from trimtab.steering.vector import VectorSteering
from trimtab.theory.tilt import Tilt


@dataclass(frozen=True, eq=False)
class Decisions:
    """First answer positions and how they begin to move; one row per prompt, in order.

    Attributes:
        tilt: probabilities and slopes `[n, vocab]`; its alpha is the strength m, signed.
        stream: before the final norm `[n, d_model]`.
        stream_slope: its derivative by m `[n, d_model]`.
        method: "jvp" or "difference".
    """

    tilt: Tilt
    stream: Tensor
    stream_slope: Tensor
    method: str


def decisions(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], at: float = 0.0
) -> Decisions:
    """Differentiate the first answer position of every prompt at strength `at`.

    Raises:
        TrimtabError: no prompts, or as `slopes` does.
    """
    if not prompts:
        raise TrimtabError(
            asked=f"the slopes of {vector.label}", found="no prompts", advice="give at least one"
        )
    found = dict(slopes(lm, vector, [lm.encode(prompt) for prompt in prompts], at))
    rows = [found[i] for i in range(len(prompts))]

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    tilt = Tilt(stacked("logits"), stacked("slope"))
    return Decisions(tilt, stacked("stream"), stacked("stream_slope"), rows[0].method)


def answer_variance(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[Tensor]:
    """Return Var_p0(s) at every answer token, float64 `[tokens]` per prompt: KL is m^2 / 2 of it."""
    encoded = [lm.encode(p, completion=a) for p, a in zip(prompts, answers, strict=True)]
    result = [torch.empty(0, dtype=torch.float64)] * len(encoded)
    for row, slope in slopes(lm, vector, encoded):
        # Without a single answer token there is the position before it, which is no part of it.
        if len(encoded[row].ids) > encoded[row].prompt_length:
            p, s = slope.logits.double().softmax(-1), slope.slope.double()
            result[row] = (p * (s - (p * s).sum(-1, keepdim=True)).square()).sum(-1)
    return result
