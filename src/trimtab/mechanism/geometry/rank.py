"""How many dimensions a contrast, or the gap's gradient, really has.

For rows D `[n, d]`, paired differences toward - away or one gradient per prompt, NOT centered, with
singular values s:

    share of the mean       n |mean|^2 / |D|_F^2          mean resultant length  |mean of D_i / |D_i||
    stable rank             |D|_F^2 / s_1^2               participation ratio    (sum s^2)^2 / sum s^4
    entropy rank            exp H(s^2 / sum s^2)

Two nulls, for two questions. Random signs of whole rows remove the mean and nothing else: they
leave every singular value exactly as it is, so they are the null of the share of the mean and of the
resultant length, and say nothing about the spectrum. Random signs of single entries keep every
entry's size and remove what dimensions have in common: the null of the spectrum and of the ranks
(Hong, Sheng and Dobriban, arXiv 2012.02985).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.margins.radius import TINY
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Printable, Table, number

DRAWS = 40  # of each null
SHOWN = 16  # singular values that are kept
MEASURES = ("mean_share", "resultant", "stable", "participation", "entropy")
# What each null is the null of.
BY_ROW = ("mean_share", "resultant")


@dataclass(frozen=True)
class Measure:
    """One number about a matrix, beside its null.

    Attributes:
        value: of the rows.
        error: its jackknife standard error, one row left out at a time.
        null: mean of the null.
        null_low: 2.5th, `null_high` 97.5th percentile of the null.
    """

    value: float
    error: float
    null: float
    null_low: float
    null_high: float

    @property
    def cell(self) -> str:
        """Value, error and null, for a table."""
        return f"{number(self.value)} ± {number(self.error)} (random {number(self.null)})"


@dataclass(frozen=True)
class RankRow:
    """The ranks of one matrix.

    Attributes:
        what: `differences`, or the gradients of a side.
        site: where it was read.
        n: rows.
        d: columns.
        mean_share: n |mean|^2 / |D|_F^2 and `resultant`, the mean resultant length; null: random
            signs of rows.
        stable: rank, `participation` ratio, `entropy` rank; null: random signs of entries.
        spectrum: s_k^2 / sum s^2, the leading ones.
        spectrum_null: 95th percentile of the same under random signs of entries.
        above_null: leading components that stand out of `spectrum_null`.
    """

    what: str
    site: str
    n: int
    d: int
    mean_share: Measure
    resultant: Measure
    stable: Measure
    participation: Measure
    entropy: Measure
    spectrum: tuple[float, ...]
    spectrum_null: tuple[float, ...]
    above_null: int


@dataclass(frozen=True)
class Ranks(Printable):
    """The ranks of differences and gradients, one row each per site."""

    rows: tuple[RankRow, ...]

    def table(self) -> Table:
        """Return one line per matrix."""
        rows = tuple(
            (
                row.what,
                row.site,
                str(row.n),
                *(getattr(row, name).cell for name in MEASURES),
                str(row.above_null),
            )
            for row in self.rows
        )
        columns = ("rows", "site", "n", "share of the mean", "resultant", "stable rank")
        columns += ("participation", "entropy rank", "above random")
        notes = (
            "not centered; ± jackknife standard error; random control: random signs of rows for the "
            "first two, of entries for the others",
            "random signs of rows leave the singular values exactly as they are",
        )
        return Table("Rank", columns, rows, notes)


def pair_differences(
    lm: LanguageModel, part: Behavior, layers: Sequence[int], max_pairs: int
) -> dict[int, Tensor]:
    """Return toward - away at the last prompt position after each layer, float64 `[n, d_model]`.

    Sides that are not paired are put together in the order given.
    """
    n = min(len(part.toward), len(part.away), max_pairs)
    toward, away = (
        capture(lm, [lm.encode(example.prompt) for example in side[:n]], layers)
        for side in (part.toward, part.away)
    )
    gap = (toward - away)[:, :, 0].double()
    return {layer: gap[:, k] for k, layer in enumerate(layers)}


def rank_row(rows: Tensor, what: str, site: str, seed: int = 0) -> RankRow:
    """Measure one matrix `[n, d]` beside its nulls."""
    rows = rows.double()
    n, d = rows.shape
    if n < 3 or not bool(rows.abs().sum() > 0) or not bool(rows.isfinite().all()):
        raise TrimtabError(
            asked=f"the rank of {n} {what} at {site}",
            found="fewer than three rows, only zeros, or values that are not finite",
            advice="give more prompts, or read a layer where the sides differ",
        )
    measured = measures(rows)
    left_out = _stack([measures(rows[torch.arange(n) != i]) for i in range(n)])
    generator = torch.Generator().manual_seed(seed)
    by_row, by_entry, spectra = [], [], []
    for _ in range(DRAWS):
        by_row.append(measures(rows * _signs((n, 1), generator)))
        scrambled = rows * _signs((n, d), generator)
        by_entry.append(measures(scrambled))
        spectra.append(spectrum(scrambled))
    nulls = {"row": _stack(by_row), "entry": _stack(by_entry)}
    found = {}
    for name in MEASURES:
        null = nulls["row" if name in BY_ROW else "entry"][name]
        spread = left_out[name] - left_out[name].mean()
        error = float((spread.square().sum() * (n - 1) / n).sqrt())
        low, high = torch.quantile(null, torch.tensor([0.025, 0.975], dtype=torch.float64))
        found[name] = Measure(measured[name], error, float(null.mean()), float(low), float(high))
    own, bound = spectrum(rows), torch.quantile(torch.stack(spectra), 0.95, dim=0)
    above = (own > bound).long().cumprod(0).sum()
    return RankRow(
        what,
        site,
        n,
        d,
        **found,
        spectrum=tuple(own[:SHOWN].tolist()),
        spectrum_null=tuple(bound[:SHOWN].tolist()),
        above_null=int(above),
    )


def measures(rows: Tensor) -> dict[str, float]:
    """Return every measure of a matrix `[n, d]`, float64."""
    energy = _energies(rows)
    total = energy.sum().clamp_min(TINY)
    share = energy / total
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)
    return {
        "mean_share": float(len(rows) * rows.mean(0).square().sum() / total),
        "resultant": float(units.mean(0).norm()),
        "stable": float(total / energy[0].clamp_min(TINY)),
        "participation": float(total**2 / energy.square().sum().clamp_min(TINY)),
        "entropy": float(torch.special.entr(share).sum().exp()),
    }


def spectrum(rows: Tensor) -> Tensor:
    """Return s_k^2 / sum s^2, largest first, float64 `[min(n, d)]`."""
    energy = _energies(rows)
    return energy / energy.sum().clamp_min(TINY)


def leading(rows: Tensor) -> Tensor:
    """Return the right singular vectors of `[n, d]` rows, strongest first, float64 `[min(n, d), d]`."""
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh


def _energies(rows: Tensor) -> Tensor:
    """Squared singular values, from the smaller Gram matrix."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def _stack(found: Sequence[dict[str, float]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([one[name] for one in found], dtype=torch.float64) for name in MEASURES
    }


def _signs(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
