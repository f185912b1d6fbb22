"""Which tokens the gap listens to, and on which way: the gradient by position, with and without attention.

g_p is the gap's gradient by the stream that enters block 0 at position p. The share of a group of
positions is sum |g_p|^2 over the group, over all positions; a split by the number of tokens is what
indifference would give. A second backward pass holds what attention adds as it is: along the skip
path and the MLPs alone nothing leaves its position, so what is left at other positions is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from trimtab.evaluation.readout import gap_of
from trimtab.margins.radius import TINY, TOKENS_PER_BATCH
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import depth_name, pulled_back
from trimtab.mechanism.geometry.propagator import SKIP_PATH
from trimtab.models.chat import Encoded, Insert, Prompt, surroundings
from trimtab.models.model import LanguageModel
from trimtab.results.quantiles import Estimate
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.prompt import prompt as prompt_lever

GROUPS = ("start", "prefix", "request", "suffix", "template", "last")


@dataclass(frozen=True)
class PositionShare:
    """One group of positions of prompts with one kind of insert.

    Attributes:
        slot: `none`, `prefix` or `suffix`: what was put into the prompts.
        group: `start`, all before the user's text; `prefix`; `request`, the user's own text;
            `suffix`; `template`, after it; `last`, the position that is read.
        tokens: mean number of tokens.
        share: of the gap's squared gradient.
        uniform: the share of the tokens, what indifference would give.
        without_attention: |g_alone| / |g|, with g_alone the gradient along the skip path and the MLPs
            alone; exactly 0 at every position but the last.
        through_attention: |g - g_alone|^2 / |g|^2, what needs attention; exactly 1 there.
    """

    slot: str
    group: str
    tokens: float
    share: Estimate
    uniform: float
    without_attention: Estimate
    through_attention: Estimate


@dataclass(frozen=True)
class PositionShares(Printable):
    """Shares by position, the share that has still to cross by depth, and what the inserts did.

    Attributes:
        n: prompts.
        rows: one per slot and group.
        crossing: slot to, per depth, the share of the gap's squared gradient that is not yet at the
            last position: what must still come through attention.
        sites: the depths of `crossing`.
        gap_change: slot to the mean change of the gap that the insert made.
        note: what identity cannot explain.
    """

    n: int
    rows: tuple[PositionShare, ...]
    crossing: dict[str, tuple[Estimate, ...]]
    sites: tuple[str, ...]
    gap_change: dict[str, Estimate]
    note: str = SKIP_PATH

    def table(self) -> Table:
        """Return one line per slot and group."""
        rows = tuple(
            (
                row.slot,
                row.group,
                number(row.tokens, 1),
                row.share.cell,
                number(row.uniform),
                row.through_attention.cell,
                row.without_attention.cell,
            )
            for row in self.rows
        )
        columns = ("insert", "positions", "tokens", "share of |g|^2", "share of tokens")
        columns += ("needs attention", "|g| without it / |g|")
        changes = ", ".join(f"{slot} {one.cell}" for slot, one in self.gap_change.items())
        notes = (
            f"gradient of the gap by what enters block 0, {self.n} prompts",
            *((f"change of the gap by the insert, nats: {changes}",) if changes else ()),
            self.note,
        )
        return Table("Which positions the gap listens to", columns, rows, notes)

    def crossing_table(self) -> Table:
        """Return, per depth, how much of the gradient is not at the last position yet."""
        slots = tuple(self.crossing)
        rows = tuple(
            (site, *(self.crossing[slot][k].cell for slot in slots))
            for k, site in enumerate(self.sites)
        )
        note = "what is not at the last position has still to be fetched by attention"
        columns = ("site", *(f"insert: {slot}" for slot in slots))
        return Table("Share of |g|^2 at other positions, by depth", columns, rows, (note,))


def request_span(lm: LanguageModel, prompt: Prompt, encoded: Encoded) -> tuple[int, int]:
    """Return the positions [start, stop) of the last user text, never the position that is read."""
    start, stop = _groups(lm, prompt, encoded, "none")["request"]
    return (start, stop) if start < stop else (0, max(1, len(encoded.ids) - 1))


def position_shares(
    case: Case, prompts: Sequence[Prompt], inserts: Mapping[str, str]
) -> PositionShares:
    """Split the gap's gradient by position, without and with each insert.

    `inserts` says what text is put at `prefix` and `suffix`.
    """
    lm, seed = case.lm, case.seed
    rows: list[PositionShare] = []
    crossing: dict[str, tuple[Estimate, ...]] = {}
    gaps: dict[str, Tensor] = {}
    for slot in ("none", *inserts):
        with nullcontext() if slot == "none" else prompt_lever(inserts[slot], slot=slot).on(lm):
            encoded = [lm.encode(prompt) for prompt in prompts]
        spans = [
            _groups(lm, prompt, one, slot) for prompt, one in zip(prompts, encoded, strict=True)
        ]
        whole, alone, crossed, gaps[slot] = _gradients(case, encoded)
        rows += _rows(slot, whole, alone, spans, seed)
        crossing[slot] = tuple(Estimate.of(depth, seed) for depth in crossed)
    changes = {
        slot: Estimate.of(gaps[slot] - gaps["none"], seed) for slot in gaps if slot != "none"
    }
    sites = tuple(depth_name(depth) for depth in range(lm.n_layers + 1))
    return PositionShares(len(prompts), tuple(rows), crossing, sites, changes)


def _gradients(
    case: Case, encoded: Sequence[Encoded]
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Per prompt g by position, whole and without attention; the share to cross by depth; the gaps."""
    lm, tokens = case.lm, case.readout
    whole, alone = dict[int, Tensor](), dict[int, Tensor]()
    crossed = torch.zeros(lm.n_layers + 1, len(encoded), dtype=torch.float64)
    gaps = torch.zeros(len(encoded), dtype=torch.float64)
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        rows = batch.rows.tolist()
        with torch.no_grad():
            logits = lm.forward(batch, logits_to_keep=1)[:, -1].cpu().double()
        gaps[rows] = gap_of(logits, tokens)
        full = pulled_back(lm, tokens, batch)
        for depth, gradient in enumerate(full):
            squares = gradient.double().square().sum(-1)
            crossed[depth, rows] = 1 - squares[:, -1] / squares.sum(-1).clamp_min(TINY)
        held = pulled_back(lm, tokens, batch, attention=False)[0]
        for index, row in enumerate(rows):
            length = len(encoded[row].ids)
            whole[row], alone[row] = full[0][index, -length:], held[index, -length:]
    order = range(len(encoded))
    return [whole[i] for i in order], [alone[i] for i in order], crossed, gaps


def _groups(
    lm: LanguageModel, prompt: Prompt, encoded: Encoded, slot: str
) -> dict[str, tuple[int, int]]:
    """The positions [start, stop) of each group in one prompt."""
    length = len(encoded.ids)
    end = min(encoded.instruction_end, length - 1)
    around = surroundings(lm.tokenizer, prompt, lm.system, Insert("prefix"))
    begin = min(_common(encoded.ids, around.before), end)
    found = {"start": (0, begin), "template": (end, length - 1), "last": (length - 1, length)}
    if slot == "prefix":
        # The request keeps its own tokens at the end of the user's text.
        cut = max(begin, length - _common(encoded.ids[::-1], around.after[::-1]))
        return {**found, "prefix": (begin, cut), "request": (cut, end)}
    if slot == "suffix":
        behind = surroundings(lm.tokenizer, prompt, lm.system, Insert("suffix", separator=""))
        cut = min(max(begin, _common(encoded.ids, behind.before)), end)
        return {**found, "request": (begin, cut), "suffix": (cut, end)}
    return {**found, "request": (begin, end)}


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))))


def _rows(
    slot: str,
    whole: Sequence[Tensor],
    alone: Sequence[Tensor],
    spans: Sequence[Mapping[str, tuple[int, int]]],
    seed: int,
) -> list[PositionShare]:
    every = _squares(whole, [(0, len(g)) for g in whole])
    lengths = torch.tensor([float(len(g)) for g in whole], dtype=torch.float64)
    through = [g - held for g, held in zip(whole, alone, strict=True)]
    found = []
    for group in GROUPS:
        places = [span.get(group, (0, 0)) for span in spans]
        counts = torch.tensor([stop - start for start, stop in places], dtype=torch.float64)
        if not counts.any():
            continue
        own = _squares(whole, places)
        some = own > 0  # a short attention window may not reach back to the first tokens
        kept, fetched = (
            _squares(parts, places)[some] / own[some].clamp_min(TINY) for parts in (alone, through)
        )
        found.append(
            PositionShare(
                slot,
                group,
                float(counts.mean()),
                Estimate.of(own / every.clamp_min(TINY), seed),
                float((counts / lengths).mean()),
                Estimate.of(kept.sqrt(), seed),
                Estimate.of(fetched, seed),
            )
        )
    return found


def _squares(gradients: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """The squared norm over each prompt's positions, float64 `[n]`."""
    parts = zip(gradients, places, strict=True)
    return torch.stack([g[slice(*at)].double().square().sum() for g, at in parts])
