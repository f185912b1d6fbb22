"""Vector to soft prompt: vectors in the slot that leave the stream as the steering leaves it.

With r the states of the steered model and h those with k free vectors in the slot, over the tokens of
the template after the request and of the answer, at one layer, `state_loss` is lowered, as in state
matching (prompts/soft/states.py), where r comes from a reference prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Conversion, Setting
from trimtab.levers.conversions.recovered import Recovered
from trimtab.models.sites import Site
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.prompts.soft.soft import Soft, descend, start_from
from trimtab.prompts.soft.states import closed, cosines, state_loss, states
from trimtab.prompts.task.rows import PromptRow, lay_out
from trimtab.prompts.task.teacher import answers_as_ids, switched
from trimtab.results import Progress
from trimtab.results.tables import Table, number

if TYPE_CHECKING:
    from trimtab.models.chat import Prompt
    from trimtab.models.model import LanguageModel
    from trimtab.steering.prompt import PromptSteering
    from trimtab.steering.vector import Switch, VectorSteering

ANSWER = 12  # answer tokens whose states are matched


@dataclass(frozen=True)
class Matched:
    """States with a lever against the steered ones, at tokens of held-out requests.

    Attributes:
        cosine: mean cos(h, r).
        shift: mean cos(h - h0, r - h0), h0 the unsteered states: of what the steering changed alone.
        closed: 1 - sum |h - r|^2 / sum |h0 - r|^2; 0 for the unsteered states, negative for worse.
        loss: of the objective.
    """

    cosine: float
    shift: float
    closed: float
    loss: float


@dataclass(frozen=True, eq=False)
class VectorAsSoft(Conversion):
    """A vector as a soft prompt, with its residual.

    Attributes:
        lever: the soft prompt in its slot.
        soft: the vectors and their training.
        layer: whose output was matched.
        matched: on held-out requests.
        null: the same with the random tokens that training started from.
        recovered: gap and behavior on test prompts.
    """

    lever: PromptSteering
    soft: Soft
    layer: int
    matched: Matched
    null: Matched
    recovered: Recovered
    lost = "share of its displacement left open, held-out requests"

    @property
    def residual(self) -> float:
        """The share of the steering's displacement that is left open on held-out requests."""
        return 1 - self.matched.closed

    def figures(self) -> Table:
        """Return the match beside its null."""
        rows = tuple(
            (name, number(m.cosine, 3), number(m.shift, 3), number(m.closed, 3), number(m.loss, 3))
            for name, m in (("trained", self.matched), ("random tokens", self.null))
        )
        columns = ("vectors", "cosine", "cosine of the shift", "closed", "loss")
        notes = (f"layer {self.layer}, {len(self.soft.vectors)} vectors, {self.soft.steps} steps",)
        return Table("vector to soft prompt", columns, rows, notes)


@dataclass(frozen=True, eq=False)
class Target:
    """Rows with the states that a lever induces at the tokens after the request.

    Attributes:
        rows: with the lever's answers.
        steered: float32 `[tokens, d_model]`.
        unsteered: the same tokens without it.
        layer: whose output they are.
    """

    rows: list[PromptRow]
    steered: Tensor
    unsteered: Tensor
    layer: int


def vector_to_soft(
    setting: Setting,
    vector: VectorSteering,
    *,
    k: int = 4,
    layer: int | None = None,
    slot: str = "prefix",
    steps: int = 80,
    learning_rate: float = 0.2,
    progress: Progress | None = None,
) -> VectorAsSoft:
    """Convert a vector into a soft prompt by matching the states it induces.

    Args:
        setting: trained on its train prompts, reported on test prompts.
        vector: at the strength to match.
        k: vectors in the slot.
        layer: whose output is matched; the deepest steered one when absent.
        slot: where the vectors stand.
        steps: of Adam.
        learning_rate: per coordinate, in units of the embeddings' root mean square.
        progress: called with steps done and steps in all.

    Raises:
        TrimtabError: a vector that changes nothing, or a layer above all that it steers.
    """
    lm, at = setting.lm, max(vector.layers) if layer is None else layer
    if not vector.strength or at < min(vector.layers):
        raise TrimtabError(
            asked=f"the states of {vector.label} at layer {at}",
            found="strength 0"
            if not vector.strength
            else f"steered layers from {min(vector.layers)}",
            advice="give a strength that steers, and a layer at or after the steered ones",
        )
    train = setting.train(8)
    tested = setting.prompts(setting.test)[: train.max_prompts]
    target = induced(lm, vector, setting.prompts(train), at, slot)
    held = induced(lm, vector, tested, at, slot)
    start = start_from(lm, k, torch.Generator().manual_seed(setting.seed))
    soft = descend(
        lm,
        start,
        lambda vectors: state_loss(_states(lm, target, vectors), target.steered)[0],
        steps=steps,
        learning_rate=learning_rate,
        progress=progress,
    )
    lever = soft.lever(lm, slot)
    return VectorAsSoft(
        lever=lever,
        soft=soft,
        layer=at,
        matched=match(lm, held, soft.vectors),
        null=match(lm, held, start.vectors),
        recovered=setting.recovered(vector, lever),
    )


def induced(
    lm: LanguageModel, lever: Switch, prompts: Sequence[Prompt], layer: int, slot: str = "prefix"
) -> Target:
    """Read the states that a lever induces, along the answers that it gives.

    Args:
        lm: the model.
        lever: one that leaves the prompts' tokens as they are.
        prompts: requests.
        layer: whose output is read.
        slot: of the rows, which another lever is to fill.
    """
    answers = answers_as_ids(lm, lever, prompts, ANSWER)
    rows = lay_out(lm, prompts, slot, targets=answers)
    read = []
    for each in (lever, None):
        with torch.no_grad(), switched(lm, each):
            read.append(torch.cat([_tail(lm, row, layer) for row in rows]))
    return Target(rows, read[0], read[1], layer)


@torch.no_grad()
def match(lm: LanguageModel, target: Target, vectors: Tensor) -> Matched:
    """Compare the states with vectors in the slot with the induced ones."""
    found = _states(lm, target, vectors.to(lm.device))
    before, wanted = target.unsteered, target.steered
    return Matched(
        cosine=float(cosines(found, wanted).mean()),
        shift=float(cosines(found - before, wanted - before).mean()),
        closed=closed(before, found, wanted),
        loss=float(state_loss(found, wanted)[0]),
    )


def _tail(lm: LanguageModel, row: PromptRow, layer: int) -> Tensor:
    """States of a row's read tokens in the plain prompt, without a slot `[tokens, d_model]`."""
    prompt = lm.encode(row.request)
    first, *rest = prompt.ids
    head = prompt.prompt_length - prompt.instruction_end
    # Its first token stands in the slot, as its own embedding: the boundaries that scopes need stay.
    plain = replace(row, before=(), after=tuple(rest), head=head)
    (found,) = states(lm, [plain], token_embeddings(lm, [first]), [Site("resid_post", layer)])
    return found[-_width(row) :]


def _width(row: PromptRow) -> int:
    """Tokens read of a row: the template's after the request, at least one, and the answer's."""
    return max(1, row.head) + max(0, len(row.target) - 1)


def _states(lm: LanguageModel, target: Target, vectors: Tensor) -> Tensor:
    """The same tokens' states with vectors in the slot, differentiable in them."""
    (found,) = states(lm, target.rows, vectors, [Site("resid_post", target.layer)])
    pieces, start = [], 0
    for row in target.rows:
        end = start + len(row.after) + max(0, len(row.target) - 1)
        pieces.append(found[end - _width(row) : end])
        start = end
    return torch.cat(pieces)
