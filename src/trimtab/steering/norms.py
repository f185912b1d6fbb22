"""Norm calibration: how long the residual stream is at each layer, the unit of strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.batch import Batch
from trimtab.models.chat import Prompt
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site

NEUTRAL_PROMPTS: tuple[str, ...] = (
    "The library opens at nine and closes at six.",
    "Water boils at a lower temperature on a mountain.",
    "How many days are there in a leap year?",
    "The train to the coast leaves from platform four.",
    "She put the letter on the table and went out.",
    "What is the capital of Portugal?",
    "Bread is made of flour, water, yeast and a little salt.",
    "The committee will meet again on the second Tuesday of March.",
    "Name three tools that a carpenter uses.",
    "The old bridge was built of stone from the valley.",
    "Copper conducts electricity better than iron.",
    "Explain what a map scale is.",
    "In autumn the leaves of the maple turn red.",
    "He counted the boxes twice and wrote the number down.",
    "Which planet is closest to the sun?",
    "The report has twelve pages and two appendices.",
    "A square has four equal sides.",
    "The shop sells pens, paper and envelopes.",
    "List the steps for planting a tree.",
    "The river runs past the mill and into the lake.",
    "Most birds build their nests in spring.",
    "What does a thermometer measure?",
    "The second edition corrects a few errors of the first.",
    "The clock in the hall is five minutes slow.",
    "Sound travels faster in water than in air.",
    "Describe how a letter gets from one town to another.",
    "The fence between the two gardens is painted green.",
    "Seven plus five is twelve.",
    "The museum keeps coins from many countries.",
    "Where is the nearest post office?",
    "The recipe asks for two eggs and a cup of milk.",
    "The road turns left behind the church.",
)


@dataclass(frozen=True)
class Norms:
    """The norm profile of a site.

    Attributes:
        mean: layer -> mean L2 norm mu_l of the site over the counted tokens; float64 arithmetic.
            Norms usually grow with depth, not always.
        count: tokens counted.
        d_model: width of the stream, for `scales`.
        site: kind of site.
    """

    mean: dict[int, float]
    count: int
    d_model: int
    site: str = "resid_post"

    @property
    def scales(self) -> dict[int, float]:
        """Layer -> raw alpha at m = 1, mu_l / sqrt(d_model).

        1/sqrt(d) is the RMS projection of a random unit direction on a vector of that norm: a
        convention that makes m comparable across layers and models, not a law.
        """
        return {layer: mu / math.sqrt(self.d_model) for layer, mu in self.mean.items()}


@torch.no_grad()
def calibrate(
    lm: LanguageModel,
    prompts: Sequence[Prompt] | None = None,
    site: str = "resid_post",
) -> Norms:
    """Measure the mean L2 norm of a site at every layer on neutral prompts, in one pass.

    The first token of a prompt and every BOS token are left out, because models park very long
    vectors there (attention sinks); so is padding. Active steering acts before the reading.

    Args:
        lm: the model.
        prompts: neutral prompts; `NEUTRAL_PROMPTS` when absent.
        site: kind of site; `embed` has layer 0 only.

    Raises:
        TrimtabError: a site the model does not have; no token left to count; norms not finite.
    """
    encoded = [lm.encode(prompt) for prompt in (NEUTRAL_PROMPTS if prompts is None else prompts)]
    layers = range(1 if site == "embed" else lm.n_layers)
    taps = {layer: lm.sites.reading(Site(site, layer)) for layer in layers}
    totals = {layer: 0.0 for layer in layers}
    count = 0
    for batch in lm.batches(encoded):
        counted = _counted(batch, lm.tokenizer.bos_token_id)
        count += int(counted.sum())

        def add(layer: int, hidden: Tensor, counted: Tensor = counted) -> None:
            # float32, since float16 overflows when squared; summed in float64
            norms = torch.linalg.vector_norm(hidden.float(), dim=-1).cpu().double()
            totals[layer] += float(norms[counted].sum()) * taps[layer].scale

        with Hooks() as hooks:
            for layer, tap in taps.items():
                hooks.at(tap, partial(add, layer))
            lm.forward(batch, logits_to_keep=1)
    if count == 0:
        raise TrimtabError(
            asked=f"the norms of {site} on {len(encoded)} prompts",
            found="no token beside the first of each prompt",
            advice="give neutral prompts of a few words",
        )
    mean = {layer: total / count for layer, total in totals.items()}
    if not all(map(math.isfinite, mean.values())):
        raise TrimtabError(
            asked=f"the norms of {site}",
            found="values that are not finite",
            advice="load the model in bfloat16 or float32",
        )
    return Norms(mean=mean, count=count, d_model=lm.d_model, site=site)


def _counted(batch: Batch, bos: object) -> Tensor:
    """Return bool `[batch, seq]` on the CPU: real tokens but the first of each row and BOS."""
    real = batch.attention_mask.bool().cpu()
    counted = real & (real.cumsum(1) > 1)
    return counted & (batch.input_ids.cpu() != bos) if isinstance(bos, int) else counted
