"""One strength in every unit people use: m, alpha, share of the norm, gaps, spreads, nats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.results.tables import Printable, Table, number, percent
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class LayerStrength:
    """The strength at one layer; None where the vector does not carry what the unit needs.

    Attributes:
        layer: 0-based layer.
        m: the dimensionless multiplier.
        alpha: raw length added along the unit direction, in units of the activations; `ablate` and
            `affine` add no fixed length, for them m is the share itself.
        relative: alpha / mu_l, the push as a share of the mean norm of the stream.
        class_gaps: alpha over |mean(toward) - mean(away)| along the direction.
        spreads: alpha over the standard deviation of the projections on the direction.
    """

    layer: int
    m: float
    alpha: float | None
    relative: float | None
    class_gaps: float | None
    spreads: float | None


@dataclass(frozen=True)
class StrengthTable(Printable):
    """Every unit at every active layer; `nats` is measured, so the caller supplies it."""

    rows: tuple[LayerStrength, ...]
    nats: float | None = None

    @property
    def sentence(self) -> str:
        """Strength m with raw alpha and its share of the stream's mean norm, for running text."""
        alphas = [number(row.alpha) for row in self.rows if row.alpha is not None]
        shares = [percent(row.relative) for row in self.rows if row.relative is not None]
        said = [f"alpha {_from_to(alphas)}"] if alphas else []
        said += [f"{_from_to(shares)} of the norm"] if shares else []
        m = f"m = {self.rows[0].m:+.3g}"
        return f"{m} ({', '.join(said)})" if said else m

    def table(self) -> Table:
        """Return one line per layer, and the measured nats underneath."""
        cells = tuple(
            (
                str(row.layer),
                number(row.m),
                number(row.alpha, 4),
                number(row.relative, 4),
                number(row.class_gaps),
                number(row.spreads),
            )
            for row in self.rows
        )
        notes = () if self.nats is None else (f"{number(self.nats, 3)} nats per token, measured",)
        columns = ("layer", "m", "alpha", "share of norm", "class gaps", "spreads")
        return Table("strength in every unit", columns, cells, notes)


def convert(vector: VectorSteering, nats: float | None = None) -> StrengthTable:
    """Express the strength of `vector` in every unit it carries the figures for.

    alpha_l = m mu_l / sqrt(d_model), so alpha_l / mu_l = m / sqrt(d_model) at every calibrated
    layer: a convention that makes m comparable across layers and models, not a law.

    Args:
        vector: the steering; its `norms`, `class_gaps` and `spreads` fill the columns.
        nats: measured KL per token at this strength, if there is one.
    """
    alphas: Mapping[int, float] = vector.alphas if vector.operation == "add" else {}
    rows = tuple(
        LayerStrength(
            layer=layer,
            m=vector.strength,
            alpha=alphas.get(layer),
            relative=_ratio(alphas.get(layer), vector.norms.get(layer)),
            class_gaps=_ratio(alphas.get(layer), vector.class_gaps.get(layer)),
            spreads=_ratio(alphas.get(layer), vector.spreads.get(layer)),
        )
        for layer in vector.layers
    )
    return StrengthTable(rows, nats)


def _from_to(layers: list[str]) -> str:
    return layers[0] if len(set(layers)) == 1 else f"{layers[0]} to {layers[-1]} by layer"


def _ratio(alpha: float | None, unit: float | None) -> float | None:
    return alpha / abs(unit) if alpha is not None and unit else None
