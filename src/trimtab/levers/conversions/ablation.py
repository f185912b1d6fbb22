"""Ablation to weights: a projection at every writer of the stream, a rank-1 update of each.

(I - m c c^T) W for the embedding, every attention output and every MLP output, biases as well. At
m = 1 no writer leaves anything along c, so the stream never has any: the same as projecting it at
every point (weights/routes/low_rank.py has the algebra).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.levers.conversions.conversion import Conversion
from trimtab.levers.conversions.vector_to_weights import InWeights, vector_to_weights
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Table, number
from trimtab.steering.norms import NEUTRAL_PROMPTS
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.weights.routes.low_rank import at_every_writer


@dataclass(frozen=True, eq=False)
class AblationAsWeights(Conversion):
    """A direction taken out of every writer, with its residuals.

    Attributes:
        lever: the projection at every writer, with a strength: the share that is taken out.
        layer: whose direction it is.
        stream_difference: at m = 1, the largest logit difference to a projection at every point of
            the stream.
        effect: the largest change of a logit that it makes, for scale.
        in_weights: the rank-1 updates after a real reload, or the refusal.
    """

    lever: Together
    layer: int
    stream_difference: float
    effect: float
    in_weights: InWeights
    lost = "logit difference to a projection of the stream everywhere, over the effect"

    @property
    def residual(self) -> float:
        """The largest logit difference to the whole stream's projection, over the effect."""
        return self.stream_difference / max(self.effect, 1e-12)

    def figures(self) -> Table:
        route = self.in_weights.routes[0]
        rows = (
            ("projection of the stream", number(self.stream_difference, 6), number(self.effect)),
            (self.in_weights.told, number(route.difference, 6), number(route.effect)),
        )
        columns = ("every writer against", "logit difference", "effect")
        return Table(f"direction of layer {self.layer} to rank-1 updates", columns, rows)


def ablation_to_weights(
    lm: LanguageModel,
    vector: VectorSteering,
    *,
    layer: int | None = None,
    prompts: Sequence[Prompt] = NEUTRAL_PROMPTS[:4],
    verify: bool = True,
) -> AblationAsWeights:
    """Take a direction out of every writer, and check that against the stream and against weights.

    The direction is that of `layer`, of the only active one by default; `prompts` are those whose
    next-token logits are compared. Without `verify` no checkpoint is written and reloaded.

    Raises:
        TrimtabError: several active layers and none named.
    """
    lever = ablating(vector, layer)
    embed = lever.vectors[0]
    c = embed.directions[0]
    sites = ("resid_pre", *(() if lm.sites.parallel else ("resid_mid",)), "resid_post")
    everywhere = [embed.select(site=site, layers=tuple(embed.directions)) for site in sites]
    plain = lm.next_logits(list(prompts))
    with lever.on(lm):
        written = lm.next_logits(list(prompts))
    with Together(tuple(everywhere)).on(lm):
        projected = lm.next_logits(list(prompts))
    chosen = next(k for k, v in vector.directions.items() if bool((v == c).all()))
    return AblationAsWeights(
        lever=lever,
        layer=chosen,
        stream_difference=float((written - projected).abs().max()),
        effect=float((written - plain).abs().max()),
        in_weights=vector_to_weights(lm, lever.vectors, routes=(), verify=verify),
    )


def ablating(vector: VectorSteering, layer: int | None = None) -> Together:
    """Return the lever that takes a share m of one direction out of every writer, at m = 1."""
    plain = vector.at(1.0).select(operation="ablate", scope="all")
    return Together(tuple(v.at(1.0) for v in at_every_writer(plain, layer)), "ablation")
