"""Reading a direction of the stream in tokens: what it promotes, and how much of it is a behavior.

A vector u is read through the final norm's gain and the unembedding, y = W (g c(u)): the tokens with
the largest y are promoted, those with the smallest suppressed. How much of that is a behavior's is

    score = (mean of y over the toward readout tokens - over the away ones) / sd of y over all tokens

which no length changes and which turns its sign with u. Other vectors' scores are its null. (The
logit lens; biases, scale and soft cap of the logits move no rank.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.readout import ReadoutTokens, readout_tokens, token_text
from trimtab.models.model import LanguageModel
from trimtab.passes.head import ROWS, Head, read_head


@dataclass(frozen=True)
class Reading:
    """What one vector says.

    Attributes:
        name: "the vector itself", "all heads", "head 5.2" of layer 5...
        length: of the vector in the stream.
        promoted: tokens with the largest y, largest first.
        suppressed: tokens with the smallest, smallest first.
        score: see the module; None without readout words.
        null_low: 2.5 % quantile of random vectors' scores.
        null_high: 97.5 % quantile.
        p: share of random vectors with a score at least as far from 0, this one counted.
        attribution: of a head, as given by the caller.
        place: (layer, head) of a head; None for a sum.
    """

    name: str
    length: float
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    score: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    p: float | None = None
    attribution: float | None = None
    place: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Lens:
    """Reads vectors in tokens.

    Attributes:
        lm: for the tokens' texts.
        head: of the model.
        vocabulary: tokens that the tokenizer knows.
        top: tokens a reading names.
        tokens: readout tokens, or None.
        contrast: mean unembedding row of toward minus away `[d_model]`, or None.
        spread: covariance of the unembedding's rows, `[d_model, d_model]`.
    """

    lm: LanguageModel
    head: Head
    vocabulary: int
    top: int
    tokens: ReadoutTokens | None
    contrast: Tensor | None
    spread: Tensor

    @classmethod
    def of(cls, lm: LanguageModel, behavior: Behavior, top: int) -> Lens:
        """Prepare to read in a model's tokens.

        Args:
            lm: the model.
            behavior: whose readout words score readings; without words there are no scores.
            top: tokens per reading.

        Raises:
            TrimtabError: a head of the vocabulary of no known form, or unusable readout words.
        """
        head = read_head(lm)
        size = min(len(lm.tokenizer), head.weight.shape[0])
        width = head.weight.shape[1]
        mean, square = torch.zeros(width), torch.zeros(width, width)
        for piece in head.weight[:size].split(ROWS):
            rows = piece.float().cpu()
            mean += rows.sum(0) / size
            square += rows.T @ rows / size
        tokens = None if behavior.readout is None else readout_tokens(lm, behavior)
        contrast = None
        if tokens is not None:
            sides = [_mean_row(head, ids) for ids in (tokens.toward, tokens.away)]
            contrast = sides[0] - sides[1]
        return cls(lm, head, size, top, tokens, contrast, square - torch.outer(mean, mean))

    def read(self, name: str, vectors: Tensor) -> Reading:
        """Read the first of `[1 + randoms, d_model]`, with the others as its null."""
        values = vectors - vectors.mean(-1, keepdim=True) if self.head.centered else vectors
        values = values * self.head.gain.float()
        pieces = self.head.weight[: self.vocabulary].split(ROWS)
        said = torch.cat([piece.float().cpu() @ values[0] for piece in pieces])
        count = min(self.top, self.vocabulary)
        promoted, suppressed = (said.topk(count, largest=side).indices for side in (True, False))
        reading = Reading(
            name=name,
            length=float(vectors[0].norm()),
            promoted=self._texts(promoted.tolist()),
            suppressed=self._texts(suppressed.tolist()),
        )
        if self.contrast is None:
            return reading
        sizes = ((values @ self.spread) * values).sum(-1).clamp_min(1e-30).sqrt()
        scores = (values @ self.contrast) / sizes
        return _scored(reading, float(scores[0]), scores[1:])

    def _texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(token_text(self.lm, i) for i in ids)


def _mean_row(head: Head, ids: Sequence[int]) -> Tensor:
    return head.weight[list(ids)].float().cpu().mean(0)


def _scored(reading: Reading, score: float, null: Tensor) -> Reading:
    if not len(null):
        return replace(reading, score=score)
    low, high = torch.quantile(null, torch.tensor([0.025, 0.975])).tolist()
    beyond = int((null.abs() >= abs(score)).sum())
    p = (1 + beyond) / (1 + len(null))
    return replace(reading, score=score, null_low=low, null_high=high, p=p)
