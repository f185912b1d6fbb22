"""Vector to hard prompt: the pull-back of a vector to the embeddings, its nearest tokens, repaired.

1. delta* `[k, d_model]`: the gradient, with respect to what stands in each place of the slot (at first
   the mean embedding), of the mean projection of the last prompt token's state on the vector.
2. Tokens: at each place the allowed ones of largest cosine with delta*, searched with a beam.
3. Repair: HotFlip lowers the cross-entropy of the answers that the steered model gives.

The pull-back is that of arXiv 2506.24056's authors, who treat prompts as vectors at the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Conversion, Setting
from trimtab.levers.conversions.recovered import Recovered
from trimtab.levers.conversions.vector_to_soft import Matched, induced, match
from trimtab.models.gradients import frozen
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.prompts.discrete.hotflip import hotflip
from trimtab.prompts.projections.project import project
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.prompts.soft.soft import Soft
from trimtab.prompts.soft.states import states
from trimtab.prompts.task.constraints import Bound, Constraints
from trimtab.prompts.task.rows import PromptRow, lay_out, slot_text
from trimtab.prompts.task.teacher import COMPLETION, answers_as_ids
from trimtab.results import Progress
from trimtab.results.tables import Table, number
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering

TRIES = 256  # random prompts of which the first legal one is the null


@dataclass(frozen=True)
class TokensMatched:
    """What some tokens in the slot are worth.

    Attributes:
        text: theirs.
        cosine: mean over places of cos(E(t) - mean E, delta*).
        reconstruction: cos(sum of E(t) - mean E over places, sum of delta*).
        loss: cross-entropy of the steered model's answers on train prompts, nats per token.
        matched: states on held-out requests against the steered ones, at the deepest steered layer.
    """

    text: str
    cosine: float
    reconstruction: float
    loss: float
    matched: Matched


@dataclass(frozen=True, eq=False)
class VectorAsPrompt(Conversion):
    """A vector as a hard prompt, with its residual.

    Attributes:
        lever: the repaired prompt in its slot.
        projected: the tokens nearest to the pull-back.
        repaired: the tokens after repair.
        null: random allowed tokens.
        recovered: gap and behavior of the repaired prompt on test prompts, beside random tokens.
        scored: candidates that repair scored.
    """

    lever: PromptSteering
    projected: TokensMatched
    repaired: TokensMatched
    null: TokensMatched
    recovered: Recovered
    scored: int
    lost = "1 - cosine of its tokens' sum with the pull-back's"

    @property
    def residual(self) -> float:
        """One minus the reconstruction cosine of the repaired tokens."""
        return 1 - self.repaired.reconstruction

    def figures(self) -> Table:
        stages = {
            "nearest tokens": self.projected,
            "repaired": self.repaired,
            "random tokens": self.null,
        }
        rows = []
        for name, found in stages.items():
            figures = (found.cosine, found.reconstruction, found.loss)
            figures += (found.matched.shift, found.matched.closed)
            rows.append((name, repr(found.text), *(number(x, 3) for x in figures)))
        columns = (
            "stage",
            "text",
            "cosine",
            "reconstruction",
            "CE",
            "cosine of the shift",
            "closed",
        )
        return Table("vector to hard prompt", columns, tuple(rows))


def vector_to_prompt(
    setting: Setting,
    vector: VectorSteering,
    *,
    k: int = 4,
    slot: str = "prefix",
    constraints: Constraints | None = None,
    steps: int = 16,
    top_k: int = 32,
    progress: Progress | None = None,
) -> VectorAsPrompt:
    """Convert a vector into a prompt of k tokens in a slot, found on train prompts.

    The tokens are printable ASCII unless `constraints` say otherwise; `steps` and `top_k` (replacements
    of each place) are HotFlip's, and 0 steps leave the nearest tokens, made legal.

    Raises:
        TrimtabError: no legal tokens, or a behavior that cannot be scored.
    """
    lm = setting.lm
    prompts = setting.prompts(train := setting.train(6))
    rows = lay_out(lm, prompts, slot, targets=answers_as_ids(lm, vector, prompts, COMPLETION))
    bound = (constraints or Constraints()).bind(lm, rows)
    generator = torch.Generator().manual_seed(setting.seed)
    delta = pull_back(lm, rows, vector, k, bound)
    soft = Soft(delta, 0.0, 0.0, (), 0, 0, 0.0, "pull-back")
    near = project(
        lm, rows, soft, "lattice", generator=generator, allowed=bound.allowed, legal=bound.legal,
    )  # fmt: skip
    kernel = Kernel(lm, rows)
    found = hotflip(
        kernel, bound, near.ids, steps=steps, top_k=top_k, generator=generator, progress=progress,
    )  # fmt: skip
    random = bound.random_slot(k, generator)
    tested = setting.prompts(setting.test)[: train.max_prompts]
    held = induced(lm, vector, tested, max(vector.layers), slot)

    def worth(ids: Sequence[int]) -> TokensMatched:
        embedded = token_embeddings(lm, ids).float().cpu() - _middle(lm, bound)
        return TokensMatched(
            text=slot_text(lm, ids),
            cosine=float(nn.functional.cosine_similarity(embedded, delta, dim=-1).mean()),
            reconstruction=float(
                nn.functional.cosine_similarity(embedded.sum(0), delta.sum(0), dim=0)
            ),
            loss=kernel.one(ids),
            matched=match(lm, held, token_embeddings(lm, ids).float()),
        )

    note: dict[str, object] = {"method": "vector to prompt", "vector": vector.label}
    lever, null = (
        PromptSteering(slot_text(lm, ids), slot=slot, provenance=note)
        for ids in (found.ids, random)
    )
    return VectorAsPrompt(
        lever=lever,
        projected=worth(near.ids),
        repaired=worth(found.ids),
        null=worth(random),
        recovered=setting.recovered(vector, lever, null),
        scored=found.scored,
    )


def pull_back(
    lm: LanguageModel, rows: Sequence[PromptRow], vector: VectorSteering, k: int, bound: Bound
) -> Tensor:
    """Return delta*, float32 `[k, d_model]`: what to add to the slot's places to move along the vector.

    The gradient of sum_l alpha_l (h_l . c_l), meaned over rows at their last prompt token, at the mean
    embedding of the allowed tokens in every place.
    """
    middle = _middle(lm, bound).expand(k, -1).clone().to(lm.device).requires_grad_(True)
    sites = [Site(vector.site, layer) for layer in vector.layers]
    prompts = [row.first(0) for row in rows]
    with frozen(lm.model):
        read = states(lm, prompts, middle, sites, last=True)
        moved = sum(
            vector.alphas[site.layer] * (h @ vector.directions[site.layer].to(h.device)).mean()
            for site, h in zip(sites, read, strict=True)
        )
        assert isinstance(moved, Tensor)  # a vector has at least one layer
        (gradient,) = torch.autograd.grad(moved, middle)
    if not float(gradient.norm()) > 0:
        raise TrimtabError(
            f"the pull-back of {vector.label} to the embeddings",
            "a slot from which nothing reaches the vector",
            "use a slot before the last prompt token",
        )
    return gradient.detach().float().cpu()


def _middle(lm: LanguageModel, bound: Bound) -> Tensor:
    """The mean embedding of the allowed tokens `[d_model]`."""
    return token_embeddings(lm)[bound.allowed.to(lm.device)].float().mean(0).cpu()
