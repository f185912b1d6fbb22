"""Tokens by their projection on the direction, on a scale taken from unsteered answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trimtab.models.capture import capture
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.results.quantiles import quantile
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class Scale:
    """Where projections become colors: 0 at `center`, full color `width` away from it."""

    center: float
    width: float

    def shade(self, projection: float) -> float:
        """Return the color of a projection, from -1 (away) to 1 (toward)."""
        return max(-1.0, min(1.0, (projection - self.center) / self.width))


@torch.no_grad()
def projections(
    lm: LanguageModel, vector: VectorSteering, prompt: Prompt, answer: str
) -> list[tuple[str, float]]:
    """Read an answer's tokens in the unsteered model, along the unit direction of the first layer.

    Steering adds the same push to every token; without it, what is left says which words carry the
    behavior by themselves. Returns each token's text and its projection; empty for no answer.
    """
    encoded = lm.encode(prompt, completion=answer)
    start, stop = encoded.prompt_length, encoded.completion_end or encoded.prompt_length
    if not answer or stop <= start:
        return []
    # To the reader all of it is a prompt, whose last positions are the answer.
    whole = replace(encoded, ids=encoded.ids[:stop], prompt_length=stop, completion_end=None)
    layer = vector.layers[0]
    read = capture(lm, [whole], [layer], positions=stop - start, site=vector.site)
    along = read[0, 0] @ vector.directions[layer]
    texts = [str(lm.tokenizer.decode([i])) for i in encoded.ids[start:stop]]
    return list(zip(texts, along.tolist(), strict=True))


def scale_of(
    lm: LanguageModel, vector: VectorSteering, pairs: Sequence[tuple[Prompt, str]]
) -> Scale:
    """Take the scale from answers: the median, and the 95th percentile of the distance from it."""
    found = [p for prompt, answer in pairs for _, p in projections(lm, vector, prompt, answer)]
    values = torch.tensor(found or [0.0], dtype=torch.float64)
    center = float(values.median())
    width = quantile((values - center).abs().sort().values, 0.95)
    return Scale(center, width or 1.0)
