"""The third objective of a soft prompt: to raise the projection on a direction at the readout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.readout import readout_tokens
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.prompts.scoring.objective import GapLoss
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.soft.soft import Soft, allowed_tokens, descend, start_from
from trimtab.prompts.soft.states import states
from trimtab.prompts.task.rows import PromptRow
from trimtab.results import Progress
from trimtab.results.tables import Table, number
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True, eq=False)
class Raised(Soft):
    """A soft prompt trained to raise a projection.

    `loss` is minus the projection in units of the state's norm, averaged over layers.

    Attributes:
        projection_start: layer -> mean of h . c at the last prompt token, h with the vectors it
            started from.
        projection: the same with the trained vectors.
        cosine: layer -> mean of cos(h, c).
        norm: length that no vector exceeds, the mean length of the tokens' embeddings.
        gap_start: mean readout gap with the start; None without a behavior.
        gap: with the trained vectors.
    """

    projection_start: Mapping[int, float]
    projection: Mapping[int, float]
    cosine: Mapping[int, float]
    norm: float
    gap_start: float | None = None
    gap: float | None = None

    def table(self) -> Table:
        """Return the training's facts, then one line per layer."""
        layers = tuple(
            (
                f"projection, layer {layer}",
                f"{number(self.projection_start[layer])} to {number(self.projection[layer])}, "
                f"cosine {number(self.cosine[layer])}",
            )
            for layer in self.projection
        )
        gaps = ()
        if self.gap is not None:
            gaps = (("readout gap", f"{number(self.gap_start)} to {number(self.gap)}"),)
        base = super().table()
        return Table("Soft prompt along a direction", ("", ""), base.rows + layers + gaps)


def raise_projection(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    vector: VectorSteering,
    k: int,
    *,
    generator: torch.Generator,
    steps: int = 60,
    learning_rate: float = 0.2,
    sign: int = 1,
    behavior: Behavior | None = None,
    progress: Progress | None = None,
) -> Raised:
    """Train k vectors that move the last prompt token's state along a vector's directions.

        maximize  mean over layers of  mean over rows of (h_l . c_l) / n_l

    with n_l the mean |h_l| at the start. After each step a vector longer than the mean embedding
    is cut back to that length, so that the prompt stays where tokens live. Answers of the rows are
    left out; sign -1 lowers the projection. The readout gap of a behavior is reported before and
    after. All else is as in `train_soft`.

    Raises:
        TrimtabError: a vector of another model, or no vectors.
    """
    vector.check(lm)
    prompts = [row.first(0) for row in rows]
    sites = [Site(vector.site, layer) for layer in vector.layers]
    along = {layer: vector.directions[layer].to(lm.device) for layer in vector.layers}
    mask = allowed_tokens(lm)
    norm = float(token_embeddings(lm)[mask.nonzero().flatten()].float().norm(dim=-1).mean())

    def within(vectors: Tensor) -> Tensor:
        """Vectors, those longer than `norm` cut back to it."""
        return vectors * (norm / vectors.norm(dim=-1, keepdim=True).clamp(min=norm))

    def read(vectors: Tensor) -> dict[int, Tensor]:
        """Layer -> states `[rows, d_model]` at the readout."""
        found = states(lm, prompts, vectors, sites, last=True)
        return dict(zip(vector.layers, found, strict=True))

    start = start_from(lm, k, generator)
    with torch.no_grad():
        start = start._replace(vectors=within(start.vectors))
        first = read(start.vectors)
    sizes = {layer: h.norm(dim=-1).mean() for layer, h in first.items()}

    def loss(vectors: Tensor) -> Tensor:
        found = read(vectors)
        shares = [(found[layer] @ c).mean() / sizes[layer] for layer, c in along.items()]
        return -sign * torch.stack(shares).mean()

    soft = descend(
        lm, start, loss, steps=steps, learning_rate=learning_rate, hold=within, progress=progress
    )
    vectors = soft.vectors.to(lm.device)
    with torch.no_grad():
        last = read(vectors)
        gaps = [None, None]
        if behavior is not None:
            tokens = readout_tokens(lm, behavior)
            lowered = GapLoss(tokens.toward, tokens.away)
            gaps = [-float(soft_loss(lm, prompts, x, lowered)) for x in (start.vectors, vectors)]
    cosine = {layer: torch.cosine_similarity(last[layer], c[None]) for layer, c in along.items()}
    return Raised(
        **vars(soft),
        projection_start={layer: float((first[layer] @ c).mean()) for layer, c in along.items()},
        projection={layer: float((last[layer] @ c).mean()) for layer, c in along.items()},
        cosine={layer: float(values.mean()) for layer, values in cosine.items()},
        norm=norm,
        gap_start=gaps[0],
        gap=gaps[1],
    )
