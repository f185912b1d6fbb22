"""How a baked steering moves a behavior's readout margin: before, after, and beside it a null.

The margin is the gap (evaluation/readout.py) on held-out prompts. A steering hardens a behavior where
the gap grows on prompts that call for it; with the other sign it softens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.readout import gap
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import bootstrap
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.weights import Scaled

SIDES = ("toward", "away")
NULLS = 3
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class MarginRow:
    """One side of the behavior; every figure in nats, (mean, low, high) of a 95 % interval.

    Attributes:
        side: `toward` or `away` prompts.
        n: held-out prompts.
        before: gap of the base model.
        after: gap of the reloaded checkpoint.
        change: after - before, paired by prompt.
        null: mean change that norm-matched random directions make.
    """

    side: str
    n: int
    before: Interval
    after: Interval
    change: Interval
    null: float


@dataclass(frozen=True)
class Margin(Printable):
    """The readout margin of a behavior before and after baking.

    Attributes:
        behavior: its name; `data_hash` of its content.
        seed: of the split whose test part was used.
        held_out: whether the vectors were found on other prompts; None where they do not say.
        rows: one a side.
    """

    behavior: str
    data_hash: str
    seed: int
    held_out: bool | None
    rows: tuple[MarginRow, ...]

    def table(self) -> Table:
        """Return one line per side."""
        cells = tuple(
            (
                row.side,
                str(row.n),
                with_interval(*row.before),
                with_interval(*row.after),
                with_interval(*row.change),
                number(row.null),
            )
            for row in self.rows
        )
        columns = ("prompts", "n", "gap before", "gap after", "change", "change by a null")
        note = f"gap: log-odds of the readout words at the answer's first token, in nats; {self._whose}"
        return Table(f"margin of {self.behavior}", columns, cells, (note,))

    @property
    def _whose(self) -> str:
        return {
            True: "held-out prompts",
            False: "the vector was found on these prompts as well",
            None: "whether the vector was found on these prompts is not recorded",
        }[self.held_out]


@dataclass(frozen=True, eq=False)
class Before:
    """What has to be measured while the base model is at hand; gaps by side, `[n]`."""

    behavior: Behavior
    seed: int
    gaps: dict[str, Tensor]
    nulls: dict[str, float]
    held_out: bool | None


def measure_before(lm: LanguageModel, vectors: Sequence[Scaled], behavior: Behavior) -> Before:
    """Measure the base model and the nulls on the test part of the behavior.

    Raises:
        TrimtabError: a behavior without readout words, or too small to split.
    """
    seed = next((s for v in vectors if isinstance(s := v.provenance.get("seed"), int)), 0)
    held_out = behavior.split(seed).test
    gaps = _gaps(lm, held_out)
    moved: dict[str, list[float]] = {side: [] for side in SIDES}
    for null_seed in null_seeds(seed, NULLS):
        with ExitStack() as stack:
            for number_, vector in enumerate(vectors):
                stack.enter_context(random_null(vector, null_seed + 101 * number_).on(lm))
            for side, values in _gaps(lm, held_out).items():
                moved[side].append(float((values - gaps[side]).mean()))
    nulls = {side: sum(values) / len(values) for side, values in moved.items()}
    return Before(behavior, seed, gaps, nulls, _held_out(vectors, behavior, seed))


def _held_out(vectors: Sequence[Scaled], behavior: Behavior, seed: int) -> bool | None:
    """Tell from what the vectors record whether the test part is new to them."""
    answers: list[bool | None] = []
    for vector in vectors:
        made = vector.provenance
        if made.get("data_hash") == behavior.data_hash and made.get("seed") == seed:
            answers.append(made.get("split") in ("train", "validation"))
        else:
            answers.append(None)
    return False if False in answers else None if None in answers else True


def measure_after(baked: LanguageModel, before: Before) -> Margin:
    """Measure the reloaded checkpoint on the same prompts."""
    after = _gaps(baked, before.behavior.split(before.seed).test)
    rows = []
    for side in SIDES:
        old, new = before.gaps[side], after[side]
        rows.append(
            MarginRow(
                side,
                len(old),
                _interval(old, bootstrap(old)),
                _interval(new, bootstrap(new)),
                _interval(new - old, bootstrap(new - old)),
                before.nulls[side],
            )
        )
    return Margin(
        before.behavior.name, before.behavior.data_hash, before.seed, before.held_out, tuple(rows)
    )


def _gaps(lm: LanguageModel, behavior: Behavior) -> dict[str, Tensor]:
    with torch.no_grad():
        return {s: gap(lm, behavior, [e.prompt for e in getattr(behavior, s)]) for s in SIDES}


def _interval(values: Tensor, bounds: tuple[float, float]) -> Interval:
    return (float(values.double().mean()), *bounds)
