"""The first-order radius: how far the residual stream has to move until the gap is gone.

To first order a push delta at layer l changes the gap by grad . delta, so the shortest push that
closes it has length |gap| / |grad|. Any factor on the logits cancels, so it can be compared between
model families; over the stream's own norm it has no unit at all. One forward and one backward pass
give every layer. It is a radius to first order only: close.py pushes for real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import ReadoutTokens, gap_of
from trimtab.margins.gap import check_finite
from trimtab.models.chat import Encoded
from trimtab.models.gradients import frozen
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.results.quantiles import Quantiles, quantiles
from trimtab.results.tables import Printable, Table, number

TOKENS_PER_BATCH = 2048  # a backward pass keeps every layer's activations
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gap's gradient by the stream after each block, at the last prompt position.

    Attributes:
        gap: float64 `[n]`, nats.
        grad: d gap / d resid_post, float32 `[n, layers, d_model]`.
        norm: of resid_post itself, float64 `[n, layers]`.
    """

    gap: Tensor
    grad: Tensor
    norm: Tensor

    @property
    def radius(self) -> Tensor:
        """Signed first-order radius gap / |grad|, float64 `[n, layers]`."""
        return self.gap[:, None] / self.grad.double().norm(dim=-1).clamp_min(TINY)

    @property
    def relative(self) -> Tensor:
        """The radius over the stream's norm, float64 `[n, layers]`."""
        return self.radius / self.norm.clamp_min(TINY)


@dataclass(frozen=True)
class RadiusLayer:
    """One layer and list of prompts.

    Attributes:
        layer: 0-based; the stream after this block.
        radius: gap / |grad|, in the stream's units; its sign is the gap's.
        relative: the radius over the stream's norm at the position.
    """

    layer: int
    radius: Quantiles
    relative: Quantiles


@dataclass(frozen=True)
class Radius(Printable):
    """First-order radii by layer.

    Attributes:
        aggregator: of the gap.
        sides: list of prompts to one entry per layer.
        values: list of prompts to relative radii `[prompt][layer]`.
    """

    aggregator: str
    sides: dict[str, tuple[RadiusLayer, ...]]
    values: dict[str, tuple[tuple[float, ...], ...]]

    def table(self) -> Table:
        sides = tuple(self.sides)
        rows = []
        for layer in range(len(self.sides[sides[0]])):
            cells = [str(layer)]
            for side in sides:
                one = self.sides[side][layer]
                cells += [number(one.radius.median), one.relative.cell]
            rows.append(tuple(cells))
        columns = ("layer", *(f"{s}: {w}" for s in sides for w in ("radius", "over |h|")))
        note = (
            "gap / |grad of the gap| by the stream after the layer, last prompt position; medians"
        )
        return Table("First-order radius", columns, tuple(rows), (note,))


def gap_gradients(
    lm: LanguageModel,
    tokens: ReadoutTokens,
    encoded: Sequence[Encoded],
    aggregator: str = "logsumexp",
) -> Gradients:
    """Differentiate the gap of each prompt by the stream after every block, at the last position.

    Active steering acts first and is taken as given. With the aggregator `max` it is the gradient of
    the two winning logits.

    Raises:
        TrimtabError: no prompts, or values that are not finite.
    """
    if not encoded:
        raise TrimtabError("the gradient of a gap", "no prompts", "give at least one prompt")
    n, layers = len(encoded), lm.n_layers
    gap = torch.zeros(n, dtype=torch.float64)
    grad = torch.zeros(n, layers, lm.d_model)
    norm = torch.zeros(n, layers, dtype=torch.float64)
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        rows = batch.rows.cpu()
        streams: list[Tensor] = []

        def keep(hidden: Tensor, streams: list[Tensor] = streams) -> None:
            if not hidden.requires_grad:
                hidden.requires_grad_()  # the first block's: with frozen weights the graph starts here
            streams.append(hidden)

        with frozen(lm.model), Hooks() as hooks:
            for layer in range(layers):
                hooks.after(lm.sites.writing(Site("resid_post", layer)).module, keep)
            logits = lm.forward(batch, logits_to_keep=1)[:, -1]
            gaps = gap_of(logits.float(), tokens, aggregator)
            # The rows of a batch do not see each other: the gradient of the sum is each row's own.
            parts = torch.autograd.grad(gaps.sum(), streams)
        check_finite(lm, logits.detach(), "logits")
        gap[rows] = gaps.detach().cpu().double()
        for layer, (part, stream) in enumerate(zip(parts, streams, strict=True)):
            grad[rows, layer] = part[:, -1].float().cpu()
            norm[rows, layer] = stream.detach()[:, -1].float().cpu().double().norm(dim=-1)
    check_finite(lm, grad, "gradients")
    return Gradients(gap, grad, norm)


def report_radius(
    gradients: Mapping[str, Gradients], aggregator: str = "logsumexp", seed: int = 0
) -> Radius:
    """Summarize gradients, one entry per list of prompts."""
    sides, values = {}, {}
    for side, one in gradients.items():
        radius, relative = one.radius, one.relative
        sides[side] = tuple(
            RadiusLayer(
                layer, quantiles(radius[:, layer], seed), quantiles(relative[:, layer], seed)
            )
            for layer in range(radius.shape[1])
        )
        values[side] = tuple(tuple(row) for row in relative.tolist())
    return Radius(aggregator, sides, values)
