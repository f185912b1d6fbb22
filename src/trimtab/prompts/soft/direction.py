"""The third objective of a soft prompt: to raise the projection on a direction at the readout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.checks import as_vector, layer_within
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap_of, readout_tokens
from trimtab.models.sites import Site
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.prompts.soft.soft import Soft, allowed_tokens, descend, starting_vectors
from trimtab.prompts.soft.states import states
from trimtab.prompts.task.rows import Row
from trimtab.results import Progress
from trimtab.results.tables import Table, number
from trimtab.steering.soft_tokens import soft_tokens
from trimtab.steering.vector import VectorSteering

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel


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
    rows: Sequence[Row],
    vector: VectorSteering | tuple[int, Tensor],
    k: int,
    *,
    generator: torch.Generator,
    init: str | Sequence[int] = "random_tokens",
    reference: Sequence[int] = (),
    steps: int = 60,
    learning_rate: float = 0.2,
    sign: int = 1,
    allowed: Tensor | None = None,
    behavior: Behavior | None = None,
    progress: Progress | None = None,
) -> Raised:
    """Train k vectors that move the last prompt token's state along a direction.

        maximize  mean over layers of  mean over rows of (h_l . c_l) / n_l

    with n_l the mean |h_l| at the start. After each step a vector longer than the mean embedding
    is cut back to that length, so that the prompt stays where tokens live.

    Args:
        lm: the model; its weights stay as they are.
        rows: requests; answers are left out.
        vector: its directions at its active layers and site; or (layer, direction), taken at
            `resid_post`, such as a feature of a sparse autoencoder.
        k: vectors in the slot.
        generator: draws the start.
        init: as in `train_soft`.
        reference: as in `train_soft`.
        steps: of Adam, the rate falling to 0 linearly.
        learning_rate: per coordinate, in units of the embeddings' root mean square.
        sign: +1 raises the projection, -1 lowers it.
        allowed: `[vocab]`, the tokens to draw from.
        behavior: whose readout gap is reported before and after.
        progress: called with steps done and steps in all.

    Raises:
        TrimtabError: no rows, a direction of another width, a layer out of depth, or a site that
            the model does not have.
    """
    if not rows or sign not in (1, -1):
        raise TrimtabError(
            f"a projection over {len(rows)} requests with sign={sign}",
            "nothing to train on" if not rows else "no direction to go",
            "give at least one request, and sign +1 or -1",
        )
    prompts = [row.first(0) for row in rows]
    directions = _directions(lm, vector)
    mask = allowed_tokens(lm, allowed)
    start, named = starting_vectors(lm, k, init, generator, mask, reference)
    norm = float(token_embeddings(lm)[mask.nonzero().flatten()].float().norm(dim=-1).mean())
    read = _reader(lm, prompts, directions)
    with torch.no_grad():
        start = _within(start.to(lm.device), norm)
        first = read(start)
    sizes = {site: h.norm(dim=-1).mean() for site, h in first.items()}

    def loss(vectors: Tensor) -> Tensor:
        found = read(vectors)
        shares = [(found[site] @ c).mean() / sizes[site] for site, c in directions.items()]
        return -sign * torch.stack(shares).mean()

    soft = descend(
        lm,
        start,
        loss,
        lambda vectors: float(loss(vectors)),
        steps=steps,
        learning_rate=learning_rate,
        init=named,
        hold=lambda vectors: _within(vectors, norm),
        progress=progress,
    )
    vectors = soft.vectors.to(lm.device)
    with torch.no_grad():
        last = read(vectors)
    return Raised(
        **{item.name: getattr(soft, item.name) for item in fields(Soft)},
        projection_start=_projections(first, directions),
        projection=_projections(last, directions),
        cosine={
            site.layer: float(torch.cosine_similarity(last[site], c[None], dim=-1).mean())
            for site, c in directions.items()
        },
        norm=norm,
        gap_start=None if behavior is None else _gap(lm, prompts, start, behavior),
        gap=None if behavior is None else _gap(lm, prompts, vectors, behavior),
    )


def _directions(
    lm: LanguageModel, vector: VectorSteering | tuple[int, Tensor]
) -> dict[Site, Tensor]:
    """Return site -> float32 unit direction `[d_model]` on the model's device."""
    if isinstance(vector, VectorSteering):
        vector.check(lm)
        return {
            Site(vector.site, layer): vector.directions[layer].to(lm.device)
            for layer in vector.layers
        }
    layer = layer_within(vector[0], lm.n_layers)
    given = as_vector(layer, vector[1], lm.d_model).float()
    if not float(given.norm()) > 0:
        raise TrimtabError(
            f"to raise the projection on the direction given for layer {layer}",
            "a vector of zeros",
            "give a direction with a length",
        )
    return {Site("resid_post", layer): (given / given.norm()).to(lm.device)}


def _reader(
    lm: LanguageModel, prompts: Sequence[Row], directions: Mapping[Site, Tensor]
) -> Callable[[Tensor], dict[Site, Tensor]]:
    """Return a function from vectors to site -> states `[rows, d_model]` at the readout."""
    sites = list(directions)

    def read(vectors: Tensor) -> dict[Site, Tensor]:
        return dict(zip(sites, states(lm, prompts, vectors, sites, last=True), strict=True))

    return read


def _within(vectors: Tensor, norm: float) -> Tensor:
    """Return vectors, those longer than `norm` cut back to it."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors * (norm / lengths.clamp(min=norm))


def _projections(
    found: Mapping[Site, Tensor], directions: Mapping[Site, Tensor]
) -> dict[int, float]:
    return {site.layer: float((found[site] @ c).mean()) for site, c in directions.items()}


@torch.no_grad()
def _gap(lm: LanguageModel, prompts: Sequence[Row], vectors: Tensor, behavior: Behavior) -> float:
    """Return the mean readout gap with vectors in the slot."""
    tokens = readout_tokens(lm, behavior)
    with soft_tokens(lm, vectors) as slot:
        gaps = [
            gap_of(lm.forward(batch, logits_to_keep=1)[:, -1].float(), tokens)
            for batch in lm.batches([row.encoded(slot) for row in prompts])
        ]
    return float(torch.cat(gaps).mean())
