"""Reading a direction of the stream in tokens: what it promotes, and how much of it is a behavior.

A vector u is read through the final norm's gain and the unembedding, y = W (g c(u)): the tokens with
the largest y are promoted, those with the smallest suppressed. How much of that is a behavior's is

    score = (mean of y over the toward readout tokens - over the away ones) / sd of y over all tokens

which no length changes and which turns its sign with u. Other vectors' scores are its null. (The
logit lens; biases, scale and soft cap of the logits move no rank.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.readout import ReadoutTokens, readout_tokens, token_text
from trimtab.models.model import LanguageModel
from trimtab.passes.head import ROWS, Head, read_head


@dataclass(frozen=True)
class LensReading:
    """What one vector says.

    Attributes:
        name: "the vector itself", "all heads", "head 5.2" of layer 5...
        length: of the vector in the stream.
        promoted: tokens with the largest y, largest first.
        suppressed: tokens with the smallest, smallest first.
        score: see the module; None without readout words.
        null_low: 2.5 %, `null_high` 97.5 % quantile of random vectors' scores.
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
        vocabulary: how many tokens the tokenizer knows.
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
        """Prepare to read `top` tokens a vector; without readout words there are no scores."""
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
            toward, away = (
                head.weight[list(ids)].float().cpu().mean(0) for ids in (tokens.toward, tokens.away)
            )
            contrast = toward - away
        return cls(lm, head, size, top, tokens, contrast, square - torch.outer(mean, mean))

    def read(self, name: str, vectors: Tensor) -> LensReading:
        """Read the first of `[1 + randoms, d_model]`, with the others as its null."""
        values = vectors - vectors.mean(-1, keepdim=True) if self.head.centered else vectors
        values = values * self.head.gain.float()
        pieces = self.head.weight[: self.vocabulary].split(ROWS)
        said = torch.cat([piece.float().cpu() @ values[0] for piece in pieces])
        count = min(self.top, self.vocabulary)
        promoted, suppressed = (said.topk(count, largest=side).indices for side in (True, False))
        reading = LensReading(
            name=name,
            length=float(vectors[0].norm()),
            promoted=tuple(token_text(self.lm, i) for i in promoted.tolist()),
            suppressed=tuple(token_text(self.lm, i) for i in suppressed.tolist()),
        )
        if self.contrast is None:
            return reading
        sizes = ((values @ self.spread) * values).sum(-1).clamp_min(1e-30).sqrt()
        scores = (values @ self.contrast) / sizes
        score, null = float(scores[0]), scores[1:]
        if not len(null):
            return replace(reading, score=score)
        low, high = torch.quantile(null, torch.tensor([0.025, 0.975])).tolist()
        p = (1 + int((null.abs() >= abs(score)).sum())) / (1 + len(null))
        return replace(reading, score=score, null_low=low, null_high=high, p=p)
