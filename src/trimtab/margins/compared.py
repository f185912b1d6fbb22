"""Two checkpoints on the same prompts: the paired difference of their gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trimtab.margins.census import Census, Share
from trimtab.margins.close import SIGNS, KlToClose
from trimtab.margins.gap import GapReport
from trimtab.margins.radius import Radius
from trimtab.margins.sets import Resolution
from trimtab.results.quantiles import Quantiles, quantiles
from trimtab.results.tables import ABSENT, Printable, Table, number, with_interval

_WHOSE = {
    True: "what was baked in was found on other prompts than these",
    False: "what was baked in was found on these prompts as well",
    None: "whether what was baked in was found on these prompts is not recorded",
}


@dataclass(frozen=True)
class AuditParts:
    """Everything that is audited of one checkpoint.

    Attributes:
        gap: the gap over prompts: aggregators, units, quantiles, values.
        census: where greedy first tokens fall.
        resolution: what the readout words became under the tokenizer.
        radius: first-order radius by layer.
        kl_to_close: nats it takes to close the gap, beside a null.
    """

    gap: GapReport
    census: Census
    resolution: Resolution
    radius: Radius
    kl_to_close: KlToClose


@dataclass(frozen=True)
class Difference:
    """Audited model minus the one it is compared with, paired by prompt.

    Attributes:
        n: prompts.
        gap: difference of the gaps, nats.
        standard: difference of the gaps over the standard deviation of each prompt's logits.
        relative_radius: difference of the signed first-order radii over the stream's norm after the
            last block; None for lists of prompts without radii.
        wider: share of prompts whose margin grew: a larger gap on `toward`, a smaller one on `away`
            prompts; None for lists that call for neither side.
        values: the gaps' difference per prompt.
        null: mean difference of the gap that random directions make in the other model, as long as
            what the audited one has baked in; None where that is not known.
    """

    n: int
    gap: Quantiles
    standard: Quantiles
    relative_radius: Quantiles | None
    wider: Share | None
    values: tuple[float, ...]
    null: float | None = None


@dataclass(frozen=True, kw_only=True)
class Compared(AuditParts, Printable):
    """A second checkpoint, whose parts these are, and how the audited one differs from it.

    Attributes:
        model: the audited one; other: the one it is compared with.
        sign: what a positive difference means.
        difference: list of prompts to the paired difference.
        held_out: whether what was baked in was found on other prompts; None where nothing says so.
    """

    model: str
    other: str
    sign: str
    difference: dict[str, Difference]
    held_out: bool | None

    def table(self) -> Table:
        nulls = any(one.null is not None for one in self.difference.values())
        rows = tuple(
            (
                side,
                str(one.n),
                number(self.gap.sides[side].gap.median),
                with_interval(one.gap.mean, one.gap.low, one.gap.high),
                one.gap.cell,
                with_interval(one.standard.mean, one.standard.low, one.standard.high),
                ABSENT if one.wider is None else one.wider.cell,
                *([number(one.null)] if nulls else []),
            )
            for side, one in self.difference.items()
        )
        columns = ("prompts", "n", "median of the other", "mean difference", "median difference")
        columns += ("mean difference / sd", "share wider")
        notes = (self.sign,)
        if nulls:
            columns += ("mean difference by a random control",)
            notes += (_WHOSE[self.held_out],)
        return Table(f"{self.model} against {self.other}", columns, rows, notes)


def compare(
    model: str,
    mine: AuditParts,
    other: str,
    theirs: AuditParts,
    seed: int,
    nulls: Mapping[str, float],
    held_out: bool | None,
) -> Compared:
    """Pair two audits of the same prompts; `nulls` has a figure per list of prompts."""
    aggregator = mine.gap.aggregator
    difference = {}
    for side, one in mine.gap.sides.items():
        values, before = one.values, theirs.gap.sides[side].values
        pairs = {
            name: torch.tensor(values[name]).double() - torch.tensor(before[name]).double()
            for name in (aggregator, "standard")
        }
        delta = pairs[aggregator]
        sign = SIGNS.get(side)
        difference[side] = Difference(
            one.n,
            quantiles(delta, seed),
            quantiles(pairs["standard"], seed),
            _radii(mine.radius, theirs.radius, side, seed),
            None if sign is None else Share.of(int((sign * delta > 0).sum()), one.n),
            tuple(delta.tolist()),
            nulls.get(side),
        )
    said = (
        f"difference = gap of {model} - gap of {other}, paired by prompt. The margin is wider where "
        "it is positive on toward prompts, negative on away prompts. Raw gaps compare checkpoints "
        "of one model; between families use the units over sd or the radius."
    )
    return Compared(
        **vars(theirs),
        model=model,
        other=other,
        sign=said,
        difference=difference,
        held_out=held_out,
    )


def _radii(mine: Radius, theirs: Radius, side: str, seed: int) -> Quantiles | None:
    if side not in mine.values:
        return None
    last = [torch.tensor([row[-1] for row in r.values[side]]).double() for r in (mine, theirs)]
    return quantiles(last[0] - last[1], seed)
