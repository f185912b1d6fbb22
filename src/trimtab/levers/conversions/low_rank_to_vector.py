"""Low-rank update to vector: its mean output, and how constant that output is.

    v = E B A x,     constant share = |E B A x|^2 / E |B A x|^2

over the tokens of held-out texts. 1 minus it is what the update does that no vector of scope `all` can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.levers.conversions.conversion import (
    Conversion,
    Setting,
    explained,
    read_writers,
    refuse_post_norm,
    together,
)
from trimtab.levers.conversions.recovered import Recovered
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Table, number
from trimtab.steering.norms import calibrate
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering, Writer

SITES = {"attention": "attn_out", "mlp": "mlp_out"}


@dataclass(frozen=True)
class MeanOutput:
    """What an update adds at one writer.

    Attributes:
        writer: the sublayer and its layer.
        length: |v| in the units of the stream, at the update's strength.
        fitted: constant share on the texts that v is the mean of.
        held_out: 1 - E |B A x - v|^2 / E |B A x|^2 on held-out texts.
        null: the same for v of the same length in a random direction.
    """

    writer: Writer
    length: float
    fitted: float
    held_out: float
    null: float


@dataclass(frozen=True, eq=False)
class LowRankAsVector(Conversion):
    """A low-rank update as vectors, with its residual.

    Attributes:
        lever: a vector at `attn_out` or `mlp_out`, or both together; scope all, m = 1 adds them as
            they are.
        outputs: one per writer.
        share: constant share over all writers, on held-out texts.
        recovered: gap and behavior on test prompts, beside random vectors of the same lengths.
    """

    lever: VectorSteering | Together
    outputs: tuple[MeanOutput, ...]
    share: float
    recovered: Recovered
    lost = "share of its output that is not constant, held-out texts"

    @property
    def residual(self) -> float:
        """The share of the update's output on held-out texts that is not constant."""
        return 1 - self.share

    def figures(self) -> Table:
        rows = tuple(
            (
                f"{o.writer[0]} of layer {o.writer[1]}",
                *(number(x, 3) for x in (o.length, o.fitted, o.held_out, o.null)),
            )
            for o in self.outputs
        )
        columns = ("writer", "|v|", "constant, fitted", "held out", "random")
        notes = (f"constant share over all writers {number(self.share, 3)}",)
        return Table("low-rank update to vector", columns, rows, notes)


def low_rank_to_vector(setting: Setting, update: WeightSteering) -> LowRankAsVector:
    """Convert a low-rank update into the vectors that it adds on average.

    Means are of train prompts with the unsteered answers, the shares and the recovery of test prompts.

    Raises:
        TrimtabError: an update of another model, or after a post-norm.
    """
    lm, seed = setting.lm, setting.seed
    update.check(lm)
    refuse_post_norm(lm, f"{update.label} as a vector", "keep the update")
    fitted, held = (
        outputs_of(lm, update, setting.answered(part)) for part in (setting.train(48), setting.test)
    )
    means = {writer: values.mean(0) for writer, values in fitted.items()}
    means = {writer: v for writer, v in means.items() if float(v.norm()) > 0}
    vectors = _vectors(lm, means)
    generator = torch.Generator().manual_seed(seed)
    rows = tuple(_row(w, means[w], fitted[w], held[w], generator) for w in means)
    left = sum(float((held[w] - means[w]).square().sum()) for w in means)
    whole = sum(float(held[w].square().sum()) for w in held)
    nulls = [
        random_null(v, s) for v, s in zip(vectors, null_seeds(seed, len(vectors)), strict=True)
    ]
    lever = together(vectors, "mean output")
    found = setting.recovered(update, lever, Together(tuple(nulls)))
    return LowRankAsVector(lever, rows, 1 - left / whole, found)


def outputs_of(
    lm: LanguageModel, update: WeightSteering, encoded: Sequence[Encoded]
) -> dict[Writer, Tensor]:
    """Return writer -> m r B A x at every token under the update, float64 `[tokens, d_model]`.

    r is the model's residual multiplier, so that they are in the units of the stream.
    """
    found: dict[Writer, list[Tensor]] = {writer: [] for writer in update.left}
    scale = update.strength * lm.sites.residual_multiplier
    factors = {w: (update.left[w].double(), update.right[w].double()) for w in found}

    def read(writer: Writer, x: Tensor, inside: Tensor) -> None:
        b, a = factors[writer]
        found[writer].append(scale * ((x[inside].double().cpu() @ a.T) @ b.T))

    with update.on(lm):
        read_writers(lm, encoded, found, read)
    return {writer: torch.cat(values) for writer, values in found.items()}


def _vectors(lm: LanguageModel, means: dict[Writer, Tensor]) -> list[VectorSteering]:
    vectors: list[VectorSteering] = []
    for kind, site in SITES.items():
        mine = {layer: v for (k, layer), v in means.items() if k == kind}
        if mine:
            made = VectorSteering.from_directions(lm, mine, site=site)
            norms = calibrate(lm, site=site).mean
            note = {"method": "mean output of a low-rank update"}
            vectors.append(replace(made, norms={k: norms[k] for k in mine}, provenance=note))
    return vectors


def _row(
    writer: Writer, v: Tensor, fitted: Tensor, held: Tensor, generator: torch.Generator
) -> MeanOutput:
    random = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    random *= v.norm() / random.norm()
    return MeanOutput(
        writer=writer,
        length=float(v.norm()),
        fitted=float(v.square().sum() / fitted.square().sum(-1).mean()),
        held_out=explained(held, v),
        null=explained(held, random),
    )
