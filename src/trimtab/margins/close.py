"""What it costs to close the gap: push the stream at one layer until the gap crosses zero.

For each prompt a unit direction is scaled until the gap is gone, and the price is KL(unsteered ||
steered) in nats at the first answer position. Two levers: the prompt's own gradient, and one shared
vector, the mean gradient of train prompts. Beside them, random directions of the same length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trimtab.evaluation.divergence import token_kl
from trimtab.evaluation.readout import ReadoutTokens, gap_of
from trimtab.margins.census import Share
from trimtab.margins.radius import TINY, TOKENS_PER_BATCH, Gradients
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.models.replay import Recording, recorded, replayed
from trimtab.results.intervals import two_way_bootstrap
from trimtab.results.quantiles import Quantiles, quantiles
from trimtab.results.tables import ABSENT, Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds

SIGNS = {"toward": 1, "away": -1}
CEILING = 8.0  # times the stream's norm: nothing of the prompt is left in a position pushed further
HALVINGS = 7  # the strength is known to better than 1 % then
NULLS = 2
FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the closing norm, where a random direction is looked at


@dataclass(frozen=True)
class CloseRow:
    """One lever on one list of prompts.

    Attributes:
        side: `toward` prompts, whose gap is pushed down to 0, or `away` prompts, pushed up to 0.
        lever: `gradient`, each prompt's own; or `shared`, one direction for all.
        n: prompts.
        open: prompts with a gap of the side's sign; the others have nothing to close.
        closed: of the open ones, those that closed within 8 times the stream's norm.
        kl: nats at the first answer position where the gap crosses 0, over open prompts; infinite
            for those that did not close.
        norm: length of that push over the stream's norm, likewise.
        null_closed: share of (prompt, random direction) that closes within the same length, with an
            interval `null_low` to `null_high` over both.
        null_kl: KL of the random directions at that length; its median.
    """

    side: str
    lever: str
    n: int
    open: int
    closed: Share | None
    kl: Quantiles
    norm: Quantiles
    null_closed: float
    null_low: float
    null_high: float
    null_kl: float


@dataclass(frozen=True)
class KlToClose(Printable):
    """The price of closing the gap.

    Attributes:
        layer: 0-based; the stream after this block is pushed, at the last prompt position.
        layer_from: how it was chosen.
        aggregator: of the gap.
        rows: one per side and lever.
    """

    layer: int
    layer_from: str
    aggregator: str
    rows: tuple[CloseRow, ...]

    def table(self) -> Table:
        rows = tuple(
            (
                row.side,
                row.lever,
                f"{row.open} of {row.n}",
                ABSENT if row.closed is None else row.closed.cell,
                number(row.kl.p25, 3),
                with_interval(row.kl.median, row.kl.median_low, row.kl.median_high, 3),
                number(row.kl.p75, 3),
                number(row.norm.median, 3),
                with_interval(row.null_closed, row.null_low, row.null_high),
                number(row.null_kl, 3),
            )
            for row in self.rows
        )
        columns = ("prompts", "lever", "open", "closed", "KL 25 %", "KL median", "KL 75 %")
        columns += ("push / |h|", "random closes", "random KL")
        notes = (
            f"layer {self.layer} ({self.layer_from}); KL(unsteered, steered) in nats at the first "
            "answer position",
            "random control: directions within the same length; a prompt without a gap of its side's "
            "sign is not open",
        )
        return Table("KL to close the gap", columns, rows, notes)


@dataclass(frozen=True, eq=False)
class Pusher:
    """Prompts, and what pushes of their last position at one layer do; made by `pusher`.

    Attributes:
        lm: the model.
        tokens: the two sets.
        aggregator: of the gap.
        layer: whose output is pushed; blocks up to it run once, not for every push.
        parts: the prompts in batches, with what the block at the layer returned.
        log_p: unsteered log-probabilities of the first answer token, float32 `[n, vocab]`.
    """

    lm: LanguageModel
    tokens: ReadoutTokens
    aggregator: str
    layer: int
    parts: Sequence[tuple[Batch, Recording]]
    log_p: Tensor

    @torch.no_grad()
    def push(self, rows: Tensor, pushes: Tensor) -> tuple[Tensor, Tensor]:
        """Return gap and KL, float64 `[k]`, of different prompts `rows [k]` under pushes `[k, d_model]`."""
        gap, kl = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(2))
        for whole, recording in self.parts:
            # Which of this part's rows are asked for, and where in the request.
            same = whole.rows.cpu()[:, None] == rows
            places, asked = same.nonzero(as_tuple=True)
            if not len(places):
                continue
            at = places.to(whole.input_ids.device)
            batch = Batch(*(getattr(whole, item.name)[at] for item in fields(whole)))
            hidden = recording.hidden[places.to(recording.hidden.device)]
            hidden[:, -1] += pushes[asked].to(hidden.device, hidden.dtype)
            with replayed(list(self.lm.sites.blocks), self.layer, recording, hidden):
                logits = self.lm.forward(batch, logits_to_keep=1)[:, -1].float().cpu()
            gap[asked] = gap_of(logits.double(), self.tokens, self.aggregator)
            kl[asked] = token_kl(self.log_p[rows[asked]], logits.log_softmax(-1))
        return gap, kl


@torch.no_grad()
def pusher(
    lm: LanguageModel,
    tokens: ReadoutTokens,
    encoded: Sequence[Encoded],
    layer: int,
    aggregator: str = "logsumexp",
) -> Pusher:
    """Read prompts once, so that pushes after block `layer` need only the blocks above it."""
    parts: list[tuple[Batch, Recording]] = []
    log_p: dict[int, Tensor] = {}
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        recording = Recording(stop=False)
        with recorded(lm.sites.blocks[layer], recording):
            logits = lm.forward(batch, logits_to_keep=1)[:, -1].float().cpu()
        log_p.update(zip(batch.rows.tolist(), logits.log_softmax(-1), strict=True))
        parts.append((batch, recording))
    ordered = torch.stack([log_p[row] for row in range(len(encoded))])
    return Pusher(lm, tokens, aggregator, layer, tuple(parts), ordered)


def close_side(
    pushes: Pusher, side: str, gradients: Gradients, shared: Tensor, seed: int = 0
) -> list[CloseRow]:
    """Close the gap of one side's prompts by both levers: down for `toward`, up for `away`.

    `gradients` are of the prompts of `pushes`; `shared` is the mean gradient of other prompts of the
    side, `[d_model]`.
    """
    sign = SIGNS[side]
    rows = (sign * gradients.gap > 0).nonzero()[:, 0]
    own = gradients.grad[rows, pushes.layer]
    levers = {"gradient": own, "shared": shared.expand(len(rows), -1)}
    reach = gradients.radius[rows, pushes.layer].abs()
    norm = gradients.norm[rows, pushes.layer]
    found = []
    for lever, directions in levers.items():
        units = -sign * directions / directions.norm(dim=-1, keepdim=True).clamp_min(TINY)
        length, kl = _close(pushes, rows, units, sign, reach, CEILING * norm)
        null = _null(pushes, rows, sign, length.minimum(CEILING * norm), seed)
        closed = int(length.isfinite().sum())
        found.append(
            CloseRow(
                side,
                lever,
                len(gradients.gap),
                len(rows),
                Share.of(closed, len(rows)) if len(rows) else None,
                quantiles(kl, seed),
                quantiles(length / norm, seed),
                *null,
            )
        )
    return found


def steepest_layer(gradients: Mapping[str, Gradients], layers: Sequence[int]) -> int:
    """Return the layer with the smallest median first-order radius over the stream's norm."""
    relative = torch.cat([one.relative.abs() for one in gradients.values()]).median(dim=0).values
    return min(layers, key=lambda layer: float(relative[layer]))


def _close(
    pushes: Pusher, rows: Tensor, units: Tensor, sign: int, start: Tensor, ceiling: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the length of the closing push and its KL, float64 `[k]`; infinite where none closes.

    The length is doubled from the first-order radius until the gap is gone, then halved between the
    last open and the first closed one. What is returned is on the closed side of zero.
    """
    low, high = torch.zeros_like(start), start.minimum(ceiling)
    kl = torch.full_like(start, torch.inf)
    closed = torch.zeros(len(rows), dtype=torch.bool)
    going = torch.ones_like(closed)
    while bool(going.any()):
        at = going.nonzero()[:, 0]
        gap, price = pushes.push(rows[at], units[at] * high[at, None].float())
        done = sign * gap <= 0
        closed[at[done]], kl[at[done]] = True, price[done]
        out = ~done & (high[at] >= ceiling[at])
        going[at[done | out]] = False
        on = at[~done & ~out]
        low[on], high[on] = high[on], (2 * high[on]).minimum(ceiling[on])
    at = closed.nonzero()[:, 0]
    for _ in range(HALVINGS if len(at) else 0):
        middle = (low[at] + high[at]) / 2
        gap, price = pushes.push(rows[at], units[at] * middle[:, None].float())
        done = sign * gap <= 0
        high[at] = torch.where(done, middle, high[at])
        low[at] = torch.where(done, low[at], middle)
        kl[at] = torch.where(done, price, kl[at])
    return torch.where(closed, high, torch.inf), kl


def _null(
    pushes: Pusher, rows: Tensor, sign: int, length: Tensor, seed: int
) -> tuple[float, float, float, float]:
    """Return share closed with its interval, and median KL, of random directions of given lengths."""
    if not len(rows):
        return math.nan, math.nan, math.nan, math.nan
    closes, prices = [], []
    for null_seed in null_seeds(seed, NULLS):
        generator = torch.Generator().manual_seed(null_seed)
        drawn = torch.randn(len(rows), pushes.lm.d_model, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * length[:, None].float()
        parts = [pushes.push(rows, drawn * fraction) for fraction in FRACTIONS]
        closes.append(torch.stack([sign * gap <= 0 for gap, _ in parts]).any(0))
        prices.append(parts[-1][1])
    grid = torch.stack(closes).double()
    share = float(grid.mean())
    low, high = two_way_bootstrap(grid, seed)
    return share, low, high, float(torch.cat(prices).median())
