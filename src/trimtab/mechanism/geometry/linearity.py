"""How far first order holds: the linearity radius, beside the size of a token edit.

At a depth the last prompt position is pushed by delta along a unit direction. First order predicts a
change g . delta of the gap. The linearity radius is the smallest |delta| at which

    |gap(h + delta) - gap(h) - g . delta|  >=  0.1 |g . delta|

along the prompt's own gradient, along the steering vector, and along a random direction; both signs,
the smaller one counts. Beside it stands what replacing one token of the request does: how far the
stream at the last position moves, and, at the embedding, along which share of the way from the one
token to the other first order holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.margins.radius import TINY
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import (
    Course,
    courses,
    depth_name,
    direction_at,
    moved_gaps,
    pulled_back,
)
from trimtab.mechanism.geometry.positions import request_span
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import spearman
from trimtab.results.quantiles import Estimate, Quantiles, quantiles
from trimtab.results.tables import Printable, Table, number, percent

TOLERANCE = 0.1
# Lengths tried, over the stream's norm; between two of them the crossing is interpolated.
LENGTHS = tuple(2.0**k for k in range(-8, 3, 2))
SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0)  # of the way from one token to another
EDITS = 2


@dataclass(frozen=True)
class LinearityRow:
    """One depth and one kind of direction.

    Attributes:
        site: where the last position is pushed.
        direction: `gradient`, `vector` or `random`.
        radius: linearity radius over |h|, per prompt; infinite beyond the largest length tried.
        token_edit: |change of h at the last position by one replaced token| / |h|.
        edit_over_radius: the two compared, per prompt: above 1 a token edit leaves the linear region.
    """

    site: str
    direction: str
    radius: Quantiles
    token_edit: Quantiles
    edit_over_radius: Quantiles


@dataclass(frozen=True)
class TokenEdits:
    """Replacing one token of the request, seen from the embedding.

    Attributes:
        n: edits.
        size: |e_b - e_a| / |e_a|, of the stream that enters block 0.
        linear_share: share of the way from e_a to e_b at which first order departs by 10 %; infinite
            where it holds all the way.
        beyond: share of edits that depart by more than 10 % before their end.
        departure: at the end, |change - predicted| / |predicted|.
        correlation: Spearman's, of predicted and measured changes of the gap.
        same_sign: share of edits whose change has the sign predicted.
    """

    n: int
    size: Quantiles
    linear_share: Quantiles
    beyond: Estimate
    departure: Quantiles
    correlation: float
    same_sign: Estimate


@dataclass(frozen=True)
class Linearity(Printable):
    """Linearity radii by depth and direction, and token edits.

    Attributes:
        tolerance: relative departure from first order that ends the linear region.
        rows: one per depth and kind of direction.
        edits: token edits, from the embedding.
    """

    tolerance: float
    rows: tuple[LinearityRow, ...]
    edits: TokenEdits

    def table(self) -> Table:
        """Return one line per depth and direction."""
        rows = tuple(
            (
                row.site,
                row.direction,
                row.radius.cell,
                row.token_edit.cell,
                row.edit_over_radius.cell,
            )
            for row in self.rows
        )
        columns = ("pushed at", "along", "radius / |h|", "token edit / |h|", "edit / radius")
        one = self.edits
        notes = (
            f"radius: smallest push of the last position at which the gap's change departs by "
            f"{percent(self.tolerance)} from first order; medians; inf: beyond {LENGTHS[-1]:g} |h|",
            f"one token replaced ({one.n} edits): |e_b - e_a| / |e_a| = {one.size.cell}; first order "
            f"holds along {number(one.linear_share.median)} of the way, "
            f"{one.beyond.cell} of edits go beyond; "
            f"predicted and measured change: Spearman {number(one.correlation)}, same sign "
            f"{one.same_sign.cell}",
        )
        return Table("Linearity radius and the size of a token edit", columns, rows, notes)


def linearity(case: Case, prompts: Sequence[Prompt], layers: Sequence[int]) -> Linearity:
    """Measure how far first order holds after some 0-based layers, and how far a token edit goes."""
    lm, seed = case.lm, case.seed
    encoded = [lm.encode(prompt) for prompt in prompts]
    if len({tuple(one.ids) for one in encoded}) < 2:
        raise TrimtabError(
            asked="the size of a token edit",
            found="fewer than two different prompts to take tokens from",
            advice="give more prompts",
        )
    generator = torch.Generator().manual_seed(seed)
    edited, origins, places = _edited(lm, prompts, encoded, generator)
    plain = [_Read(case, one) for one in courses(lm, encoded)]
    after = _by_row(courses(lm, edited), len(edited), lm.n_layers)
    before = _by_row([one.course for one in plain], len(encoded), lm.n_layers)
    rows = []
    for layer in layers:
        size = (after[layer + 1] - before[layer + 1][origins]).norm(dim=-1)
        norm = before[layer + 1].norm(dim=-1)
        edit = torch.zeros(len(encoded)).index_add_(0, origins, size / EDITS) / norm
        for kind in ("gradient", "vector", "random"):
            own = direction_at(case.vector, layer + 1)
            if kind == "vector" and own is None:
                continue
            radius = torch.empty(len(encoded), dtype=torch.float64)
            for one in plain:
                units = one.units(kind, layer + 1, own, generator)
                radius[one.course.batch.rows.cpu()] = one.radius(layer + 1, units)
            rows.append(
                LinearityRow(
                    depth_name(layer + 1),
                    kind,
                    quantiles(radius, seed),
                    quantiles(edit, seed),
                    quantiles(edit / radius, seed),
                )
            )
    found = _token_edits(plain, edited, origins, places, after[0], seed)
    return Linearity(TOLERANCE, tuple(rows), found)


def crossing(lengths: Sequence[float], departures: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Return where departures `[lengths, n]` first reach the tolerance, float64 `[n]`; inf for never.

    Between two lengths both logarithms are interpolated: to second order the relative departure
    grows in proportion to the length, so it is exact there, below the first length as well.
    """
    reached = departures.double() >= tolerance
    found = torch.full((departures.shape[1],), math.inf, dtype=torch.float64)
    for column in range(departures.shape[1]):
        at = reached[:, column].nonzero()
        if not len(at):
            continue
        k = int(at[0])
        here = float(departures[k, column])
        if k == 0:
            found[column] = lengths[0] * tolerance / here
            continue
        below = max(float(departures[k - 1, column]), TINY)
        share = math.log(tolerance / below) / math.log(here / below) if here > below else 1.0
        found[column] = lengths[k - 1] * (lengths[k] / lengths[k - 1]) ** share
    return found


class _Read:
    """One batch with its gap and gradients."""

    def __init__(self, case: Case, course: Course) -> None:
        self.case, self.course = case, course
        self.gradients = pulled_back(case.lm, case.readout, course.batch)
        self.gap = self.moved(0, torch.zeros_like(course.entry)[None])[0]

    def moved(self, depth: int, pushes: Tensor) -> Tensor:
        return moved_gaps(self.case.lm, self.case.readout, self.course, depth, pushes)

    def units(
        self, kind: str, depth: int, own: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Unit directions `[rows, d_model]`."""
        g = self.gradients[depth][:, -1]
        if kind == "random":
            g = torch.randn(g.shape, generator=generator)
        elif kind == "vector":
            assert own is not None  # left out otherwise
            g = own.expand_as(g)
        return g / g.norm(dim=-1, keepdim=True).clamp_min(TINY)

    def radius(self, depth: int, units: Tensor) -> Tensor:
        """Linearity radius over |h| `[rows]`, the smaller one of both signs."""
        hidden = self.course.hidden(depth)
        norm = hidden[:, -1].float().norm(dim=-1).cpu()
        lengths = torch.tensor(LENGTHS)[:, None, None] * norm[:, None]
        steps = lengths * units
        predicted = (steps * self.gradients[depth][:, -1]).sum(-1).double()
        sides = []
        for sign in (1, -1):
            pushes = hidden.new_zeros(len(LENGTHS), *hidden.shape)
            pushes[:, :, -1] = (sign * steps).to(hidden)
            change = self.moved(depth, pushes) - self.gap
            sides.append(departure(change, sign * predicted))
        return torch.stack([crossing(LENGTHS, side) for side in sides]).amin(0)


def departure(change: Tensor, predicted: Tensor) -> Tensor:
    """Return |change - predicted| / |predicted|."""
    return (change - predicted).abs() / predicted.abs().clamp_min(TINY)


def _edited(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    generator: torch.Generator,
) -> tuple[list[Encoded], Tensor, list[int]]:
    """Prompts with one token of the request replaced by one of the others', whose, and where."""
    spans = [request_span(lm, prompt, one) for prompt, one in zip(prompts, encoded, strict=True)]
    pool = sorted({i for one, at in zip(encoded, spans, strict=True) for i in one.ids[slice(*at)]})
    edited, origins, places = [], [], []
    for row, one in enumerate(encoded):
        start, stop = spans[row]
        for _ in range(EDITS):
            place = start + int(torch.randint(stop - start, (1,), generator=generator))
            others = [i for i in pool if i != one.ids[place]]
            token = others[int(torch.randint(len(others), (1,), generator=generator))]
            ids = [*one.ids[:place], token, *one.ids[place + 1 :]]
            edited.append(replace(one, ids=ids))
            origins.append(row)
            places.append(place - len(one.ids))  # from the end: rows are padded in front
    return edited, torch.tensor(origins), places


def _by_row(parts: Sequence[Course], n: int, depths: int) -> list[Tensor]:
    """The stream at the last position, float32 `[n, d_model]` per depth; whole rows for depth 0."""
    found = [torch.empty(n, parts[0].entry.shape[-1]) for _ in range(depths)]
    for part in parts:
        for depth, last in enumerate(found, 1):
            last[part.batch.rows.cpu()] = part.hidden(depth)[:, -1].float().cpu()
    width = max(part.entry.shape[1] for part in parts)
    entries = parts[0].entry.new_zeros(n, width, parts[0].entry.shape[2]).float().cpu()
    for part in parts:
        entries[part.batch.rows.cpu(), width - part.entry.shape[1] :] = part.entry.float().cpu()
    return [entries, *found]


def _token_edits(
    plain: Sequence[_Read],
    edited: Sequence[Encoded],
    origins: Tensor,
    places: Sequence[int],
    entries: Tensor,
    seed: int,
) -> TokenEdits:
    """Walk from one token to the other at the embedding."""
    n = len(edited)
    size, share, final, change, predicted = torch.empty(5, n, dtype=torch.float64)
    for one in plain:
        for index, row in enumerate(one.course.batch.rows.tolist()):
            for edit in (origins == row).nonzero()[:, 0].tolist():
                place = places[edit]
                own = one.course.entry[index, place].float().cpu()
                step = entries[edit, place] - own
                size[edit] = step.norm() / own.norm()
                slope = float((one.gradients[0][index, place] * step).double().sum())
                found = _walk(one, index, place, step)
                told = slope * torch.tensor(SHARES, dtype=torch.float64)
                off = departure(found, told)
                share[edit] = crossing(SHARES, off[:, None])[0]
                final[edit], change[edit], predicted[edit] = off[-1], found[-1], told[-1]
    return TokenEdits(
        n,
        quantiles(size, seed),
        quantiles(share, seed),
        Estimate.share(share < 1, seed),
        quantiles(final, seed),
        spearman(predicted, change) if n > 1 else math.nan,
        Estimate.share(predicted.sign() == change.sign(), seed),
    )


def _walk(one: _Read, index: int, place: int, step: Tensor) -> Tensor:
    """The gap's change along the way `[shares]`, one row of a batch moved at one position."""
    entry = one.course.entry
    pushes = entry.new_zeros(len(SHARES), *entry.shape)
    pushes[:, index, place] = (torch.tensor(SHARES)[:, None] * step).to(entry)
    return one.moved(0, pushes)[:, index] - one.gap[index]
