"""State matching: vectors in the slot that leave the residual stream as the reference left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.checks import layer_within
from trimtab.models.batch import Batch
from trimtab.models.generation import answer_ids, decode, end_ids
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.replay import Stopped
from trimtab.models.sites import Site
from trimtab.prompts.scoring.objective import CrossEntropy
from trimtab.prompts.soft.embeddings import soft_loss, standing, token_embeddings
from trimtab.prompts.soft.soft import Soft, allowed_tokens, descend, start_from
from trimtab.prompts.task.rows import PromptRow, slot_text
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.soft_tokens import soft_tokens

NEAR = 1e-12  # keeps the cosine of a zero vector finite


@dataclass(frozen=True, eq=False)
class StateMatch:
    """Vectors whose states at one layer are those of the reference.

    Cosines are between the two states of a token after the slot: with the vectors, and with the
    reference, over all such tokens of all rows.

    Attributes:
        layer: 0-based; the output of this block is matched.
        soft: the vectors and their training.
        cosine_start: mean cosine with the vectors it started from, the null of `cosine`.
        cosine: mean cosine.
        cosine_min: smallest.
        recovered: 1 - |h - h_ref|^2 / |h_start - h_ref|^2, the share of the difference closed.
        ids: the nearest allowed tokens.
        text: theirs.
        loss: cross-entropy with the vectors; None for rows without answers.
        loss_projected: of the nearest tokens.
        continuation: greedy answer to the first row's request with the vectors in the slot.
        continuation_projected: the same with the nearest tokens.
    """

    layer: int
    soft: Soft
    cosine_start: float
    cosine: float
    cosine_min: float
    recovered: float
    ids: tuple[int, ...]
    text: str
    loss: float | None
    loss_projected: float | None
    continuation: str = ""
    continuation_projected: str = ""


@dataclass(frozen=True, eq=False)
class StateSweep(Printable):
    """State matching at each of several layers.

    Attributes:
        matches: one per layer.
        reference: the reference's tokens.
        reference_text: its text.
        reference_loss: its own loss on the rows.
    """

    matches: tuple[StateMatch, ...]
    reference: tuple[int, ...] = field(repr=False)
    reference_text: str
    reference_loss: float | None

    def table(self) -> Table:
        """Return one line per layer."""
        columns = (
            *("layer", "steps", "seconds", "cosine from", "mean", "min", "closed"),
            *("CE", "nearest tokens", "their CE", "answer with the vectors"),
        )
        rows = tuple(
            (
                *(str(m.layer), str(m.soft.steps), number(m.soft.seconds, 1)),
                number(m.cosine_start, 3),
                *(number(x, 4) for x in (m.cosine, m.cosine_min, m.recovered)),
                *(number(m.loss, 3), repr(m.text)),
                number(m.loss_projected, 3),
                m.continuation,
            )
            for m in self.matches
        )
        notes = ("cosine from: mean cosine before training; closed: share of the difference gone",)
        if self.reference_text:
            own = number(self.reference_loss, 3)
            notes = (f"reference {self.reference_text!r}, CE {own}", *notes)
        return Table("State matching", columns, rows, notes)


def match_states(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    reference: Sequence[int],
    layer: int,
    *,
    generator: torch.Generator,
    k: int | None = None,
    init: str | Sequence[int] = "random_tokens",
    steps: int = 150,
    learning_rate: float = 0.2,
    until: float = 0.997,
    allowed: Tensor | None = None,
    answer_tokens: int = 24,
) -> StateMatch:
    """Train k vectors until the states at one layer are those that the reference induces.

    Lowered is `state_loss` over all tokens after the slot (separator, request, assistant head,
    answer), with h and r the states that leave block `layer`, with the vectors and with the
    reference. The forward pass ends at `layer`. With another k than the reference's, tokens are
    compared with themselves, at positions shifted by the difference; it is the same by default.
    Training stops once the mean cosine is `until`.

    What starts and steps it is as in `train_soft`; `allowed` are also the tokens to project to, and
    `answer_tokens` is the length of the sample answers, 0 for none.

    Raises:
        TrimtabError: a layer out of depth, or a loss that is not finite.
    """
    at = layer_within(layer, lm.n_layers)
    start = start_from(lm, k or len(reference), generator, init, reference, allowed)
    sites = [Site("resid_post", at)]

    def read(vectors: Tensor) -> Tensor:
        return states(lm, rows, vectors, sites)[0]

    with torch.no_grad():
        wanted, first = read(token_embeddings(lm, reference)), read(start.vectors)
    mean = -1.0

    def loss(vectors: Tensor) -> Tensor:
        nonlocal mean
        lowered, near = state_loss(read(vectors), wanted)
        mean = float(near.detach())
        return lowered

    soft = descend(
        lm, start, loss, steps=steps, learning_rate=learning_rate, enough=lambda: mean >= until
    )
    vectors = soft.vectors.to(lm.device)
    ids = nearest_tokens(lm, vectors, allowed_tokens(lm, allowed))
    tokens = token_embeddings(lm, ids)
    with torch.no_grad():
        last = read(vectors)
    near = cosines(last, wanted)
    return StateMatch(
        layer=at,
        soft=soft,
        cosine_start=float(cosines(first, wanted).mean()),
        cosine=float(near.mean()),
        cosine_min=float(near.min()),
        recovered=closed(first, last, wanted),
        ids=ids,
        text=slot_text(lm, ids),
        loss=_loss(lm, rows, vectors),
        loss_projected=_loss(lm, rows, tokens),
        continuation=_continuation(lm, rows[0], vectors, answer_tokens),
        continuation_projected=_continuation(lm, rows[0], tokens, answer_tokens),
    )


def match_every_layer(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    reference: Sequence[int],
    *,
    generator: torch.Generator,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> StateSweep:
    """Run `match_states` with its options at each layer (all by default), each from the same start.

    `progress` is called with layers done and layers in all.
    """
    chosen = range(lm.n_layers) if layers is None else layers
    seed = int(torch.randint(2**31, (1,), generator=generator))
    matches = []
    for layer in chosen:
        same = torch.Generator().manual_seed(seed)
        matches.append(match_states(lm, rows, reference, layer, generator=same, **options))
        if progress is not None:
            progress(len(matches), len(chosen))
    own = _loss(lm, rows, token_embeddings(lm, reference))
    return StateSweep(tuple(matches), tuple(reference), slot_text(lm, reference), own)


def states(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    vectors: Tensor,
    sites: Sequence[Site],
    last: bool = False,
) -> tuple[Tensor, ...]:
    """Return the values of sites at the tokens after the slot, float32 `[tokens, d_model]` each.

    Rows stand in the order given; with `last`, only the last prompt token of each, `[rows, d_model]`.
    The forward pass ends at the last site that it comes to; gradients flow to the vectors.
    """
    with standing(lm, rows, vectors) as batch:
        streams = _read(lm, batch, sites)
    longest = batch.input_ids.shape[1]
    spans: dict[int, tuple[int, int, int]] = {}
    for place, at in enumerate(batch.rows.tolist()):
        row = rows[at]
        # Rows are padded on the left, so all end in the last column; the last target is not fed.
        end = longest - max(0, len(row.target) - 1)
        spans[at] = (place, end - 1, end) if last else (place, end - len(row.after), longest)
    ordered = [spans[row] for row in range(len(rows))]
    return tuple(
        torch.cat([stream[place, start:end] for place, start, end in ordered]).float()
        for stream in streams
    )


def _read(lm: LanguageModel, batch: Batch, sites: Sequence[Site]) -> list[Tensor]:
    """Return the sites' values `[batch, seq, d_model]`, ending the pass once all are there."""
    found: dict[int, Tensor] = {}

    def keep(number: int, scale: float, hidden: Tensor) -> None:
        found[number] = hidden * scale if scale != 1 else hidden
        if len(found) == len(sites):
            raise Stopped

    with Hooks() as hooks:
        for number, site in enumerate(sites):
            tap = lm.sites.reading(site)
            hooks.at(tap, partial(keep, number, tap.scale))
        try:
            lm.forward(batch, logits_to_keep=1)
        except Stopped:
            pass
    return [found[number] for number in range(len(sites))]


def nearest_tokens(lm: LanguageModel, vectors: Tensor, allowed: Tensor) -> tuple[int, ...]:
    """Return the allowed tokens whose embeddings have the largest cosine with the vectors."""
    pool = allowed.nonzero().flatten()
    rows = nn.functional.normalize(token_embeddings(lm)[pool.to(lm.device)].float(), dim=-1)
    best = (vectors.to(rows.device, rows.dtype) @ rows.T).argmax(-1)
    return tuple(pool[best.cpu()].tolist())


def cosines(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the cosines of states `[..., d_model]` along their last axis."""
    return nn.functional.cosine_similarity(found, wanted, dim=-1, eps=NEAR)


def state_loss(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean |h - r|^2 / mean |r|^2 + mean (1 - cos(h, r)), and the mean cosine."""
    size = wanted.square().sum(-1).mean().clamp(min=NEAR)
    near = cosines(found, wanted).mean()
    return (found - wanted).square().sum(-1).mean() / size + 1 - near, near


def closed(first: Tensor, last: Tensor, wanted: Tensor) -> float:
    """Return 1 - |last - wanted|^2 / |first - wanted|^2, the share of a difference that is gone."""
    left, before = ((x - wanted).square().sum() for x in (last, first))
    return float(1 - left / before.clamp(min=NEAR))


@torch.no_grad()
def _loss(lm: LanguageModel, rows: Sequence[PromptRow], vectors: Tensor) -> float | None:
    """The cross-entropy of the rows' answers; None for rows without."""
    return float(soft_loss(lm, rows, vectors, CrossEntropy())) if rows[0].target else None


def _continuation(lm: LanguageModel, row: PromptRow, vectors: Tensor, tokens: int) -> str:
    """Return the greedy answer with vectors in the slot."""
    if tokens == 0:
        return ""
    with soft_tokens(lm, vectors) as slot:
        (ids,) = answer_ids(lm, [row.first(0).encoded(slot)], tokens)
    return decode(lm.tokenizer, ids, end_ids(lm))
