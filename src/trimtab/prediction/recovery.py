"""Recovery: how far the stream returns to its unsteered course after a very large push.

After a push at layer l the later blocks read a stream that points almost wholly along the push. Do
they bring it back? Per layer, at the last prompt token:

    distance = |h_steered - h| / |h|          cosine = h_steered . h / (|h_steered| |h|)

and, at the end, whether the model answers as if nothing had been pushed. An open question of
Taimeskhanov, Vaiter and Garreau (arXiv 2602.02712).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean
from trimtab.models.capture import capture
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Printable, Table, number, percent
from trimtab.steering.vector import VectorSteering

LARGE = (1.0, 10.0, 100.0, 1000.0)  # of the vector's own strength


@dataclass(frozen=True)
class RecoveryRow:
    """One strength: the stream by depth, and the answers.

    Attributes:
        strength: m.
        distance: per layer, the mean over prompts.
        cosine: per layer, the mean over prompts.
        same_first: share of prompts whose most likely first token is the unsteered one.
        same_answer: share of greedy answers that are the unsteered ones, letter for letter.
        coherence: mean of the answers; None without an evaluator.
    """

    strength: float
    distance: tuple[float, ...]
    cosine: tuple[float, ...]
    same_first: float
    same_answer: float
    coherence: float | None


@dataclass(frozen=True)
class Recovery(Printable):
    """Every strength, in the order given."""

    label: str
    layers: tuple[int, ...]
    scope: str
    prompts: int
    rows: tuple[RecoveryRow, ...]

    def table(self) -> Table:
        last = max(self.layers)
        rows = tuple(
            (
                f"{row.strength:+g}",
                number(row.distance[last]),
                number(row.cosine[last]),
                number(row.distance[-1]),
                number(row.cosine[-1]),
                percent(row.same_first),
                percent(row.same_answer),
                number(row.coherence),
            )
            for row in self.rows
        )
        where = f"layers {', '.join(map(str, self.layers))}, scope {self.scope}"
        columns = ("m", "distance at the push", "cosine", "distance at the end", "cosine ",
                   "same first token", "same answer", "coherence")  # fmt: skip
        return Table(f"recovery: {self.label}, {where}", columns, rows)


@torch.no_grad()
def recovery(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    strengths: Sequence[float] | None = None,
    *,
    evaluator: Evaluator | None = None,
    max_new_tokens: int = 40,
) -> Recovery:
    """Push very hard and look at every layer, at the last prompt token, and at the answers.

    The strengths are the vector's own times 1, 10, 100 and 1000 by default; without an evaluator the
    answers' coherence is left out.
    """
    chosen = [vector.strength * f for f in LARGE] if strengths is None else list(strengths)
    listed = list(prompts)
    if not listed:
        raise TrimtabError("what a vector leaves at depth", "no prompts", "give at least one prompt")
    before, logits = _stream(lm, listed), lm.next_logits(listed)
    answers = lm.generate(listed, max_new_tokens=max_new_tokens)
    rows: list[RecoveryRow] = []
    for m in chosen:
        with vector.at(m).on(lm):
            after, steered = _stream(lm, listed), lm.next_logits(listed)
            said = lm.generate(listed, max_new_tokens=max_new_tokens)
        distance = (after - before).norm(dim=-1) / before.norm(dim=-1)
        cosine = torch.cosine_similarity(after, before, dim=-1)
        rows.append(
            RecoveryRow(
                strength=m,
                distance=tuple(distance.mean(0).tolist()),
                cosine=tuple(cosine.mean(0).tolist()),
                same_first=float((steered.argmax(-1) == logits.argmax(-1)).double().mean()),
                same_answer=sum(a == b for a, b in zip(said, answers, strict=True)) / len(listed),
                coherence=None
                if evaluator is None
                else mean([answer.coherence for answer in evaluator.judged(listed, said)]),
            )
        )
    return Recovery(vector.label, vector.layers, str(vector.scope), len(listed), tuple(rows))


def _stream(lm: LanguageModel, prompts: Sequence[Prompt]) -> Tensor:
    """The stream after every layer at the last prompt token, float64 `[n, layers, d_model]`."""
    encoded = [lm.encode(prompt) for prompt in prompts]
    values = capture(lm, encoded, range(lm.n_layers), positions="last")
    return values[:, :, 0].double()
