"""The propagator: does the residual stream carry a push unchanged, J = I, as is often supposed?

A push v at one depth arrives at the last prompt position of the final stream as J v. Pushed at that
position alone, it is J_TT v (same position); pushed at all positions, sum_p J_Tp v (broadcast); the
difference came through attention from other positions (cross), where identity predicts nothing at
all. Per depth:

    gain |Jv| / |v|     cosine cos(Jv, v)     departure |Jv - v| / |v|     identity: 1, 1, 0
    |J_TT - I|_F / |I|_F = sqrt(E |J z - z|^2 / d) over probes z with E z z^T = I (Hutchinson)
    backward: cos(g_l, g_L) and |g_l| / |g_L| of the gap's gradients       identity: 1, 1

each beside random directions of equal norm, which are the probes themselves. The secant replaces the
derivative by the change under the vector's real strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.margins.radius import TINY
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import (
    Course,
    carried,
    courses,
    depth_name,
    direction_at,
    pulled_back,
    secant,
)
from trimtab.models.chat import Encoded
from trimtab.results.quantiles import Estimate
from trimtab.results.tables import ABSENT, Printable, Table, number

SKIP_PATH = (
    "The skip path never crosses positions: identity cannot explain what prefix or suffix tokens do "
    "to the last position; all of that arrives through attention."
)
PROBES = 4
KINDS = ("same", "broadcast", "cross")
SECANTS = ("same", "random same", "broadcast", "random broadcast")
WHAT = ("gain", "cos", "|Jv-v|")


@dataclass(frozen=True)
class Carried:
    """How a push arrives (module docstring), means over prompts; of random ones over directions too."""

    gain: Estimate
    cosine: Estimate
    departure: Estimate


@dataclass(frozen=True)
class Frobenius:
    """A Frobenius norm over |I|_F = sqrt(d), by Hutchinson probes.

    Attributes:
        value: sqrt(E |(J - I) z|^2 / d), or of the cross-position part alone.
        error: its standard error, over prompts, each with probes of its own.
    """

    value: float
    error: float

    @property
    def cell(self) -> str:
        """The value and its standard error, for a table."""
        return f"{number(self.value)} ± {number(self.error)}"


@dataclass(frozen=True)
class PropagatorLayer:
    """One depth.

    Attributes:
        site: where the stream is pushed.
        growth: |h_L| / |h_l| at the last position: what a direction that keeps its share would gain.
        vector: `same`, `broadcast` and `cross` to how the steering vector's own direction of this
            layer arrives; empty where it has none.
        random: the same of random directions.
        one_block: `vector` and `random` pushes at the last position, one block further on.
        secant: `same` and `broadcast` at the vector's strength, and `random same`, `random
            broadcast` of equal norm; empty without a direction.
        same_frobenius: |J_TT - I|_F / |I|_F.
        cross_frobenius: |sum over p < T of J_Tp|_F / |I|_F, what broadcast steering adds.
        backward_cosine: cos(g_l, g_L) of the gap's gradients at the last position.
        backward_gain: |g_l| / |g_L|.
    """

    site: str
    growth: Estimate
    vector: dict[str, Carried]
    random: dict[str, Carried]
    one_block: dict[str, Carried]
    secant: dict[str, Carried]
    same_frobenius: Frobenius
    cross_frobenius: Frobenius
    backward_cosine: Estimate
    backward_gain: Estimate


@dataclass(frozen=True)
class Propagator(Printable):
    """How pushes arrive at the final stream, from every depth.

    Attributes:
        label: of the vector.
        n: prompts.
        probes: random directions per prompt and depth.
        method: "jvp" or "difference".
        d_model: width; a random direction has a cosine of about 1 / sqrt(d_model) with any other.
        layers: one entry per depth below the last.
        note: what identity cannot explain.
    """

    label: str
    n: int
    probes: int
    method: str
    d_model: int
    layers: tuple[PropagatorLayer, ...]
    note: str = SKIP_PATH

    def table(self) -> Table:
        """Return the same-position part, one line per depth, vector beside random."""
        rows = tuple(
            (
                one.site,
                number(one.growth.mean),
                *_cells(one.vector.get("same")),
                *_means(one.random["same"]),
                one.same_frobenius.cell,
                one.backward_cosine.cell,
                one.backward_gain.cell,
            )
            for one in self.layers
        )
        columns = ("pushed at", "|h_L|/|h|")
        columns += tuple(f"{who} {what}" for who in ("v", "random") for what in WHAT)
        columns += ("|J-I|/|I|", "cos(g,g_L)", "|g|/|g_L|")
        notes = (
            "J = I predicts gain 1, cos 1, |Jv-v| 0, |J-I| 0, cos(g, g_L) 1, |g|/|g_L| 1; a random "
            f"gradient has |cos| of about {number(self.d_model**-0.5)}",
            f"{self.n} prompts, {self.probes} random directions each, pushed and read at the last "
            f"position; {self.method}; the vector: {self.label}",
        )
        return Table("Propagator, same position", columns, rows, notes)

    def cross_table(self) -> Table:
        """Return what other positions add when all are pushed, one line per depth."""
        rows = tuple(
            (
                one.site,
                *_cells(one.vector.get("broadcast")),
                *_cells(one.vector.get("cross"))[:2],
                *_means(one.random["cross"])[:2],
                one.cross_frobenius.cell,
            )
            for one in self.layers
        )
        columns = ("pushed at", *(f"all: {what}" for what in WHAT))
        columns += tuple(f"cross, {who}: {what}" for who in ("v", "random") for what in WHAT[:2])
        columns += ("|J_cross|/|I|",)
        notes = ("cross: the part that other positions' pushes add; identity predicts 0", self.note)
        return Table("Propagator, across positions", columns, rows, notes)

    def secant_table(self) -> Table:
        """Return the change under real pushes of the vector's strength, one line per depth."""
        rows = tuple(
            (
                one.site,
                *(cell for kind in SECANTS for cell in _means(one.secant[kind])[:2]),
                *_means(one.one_block["vector"])[:2],
                *_means(one.one_block["random"])[:2],
            )
            for one in self.layers
            if one.secant
        )
        columns = ("pushed at", *(f"{kind} {what}" for kind in SECANTS for what in WHAT[:2]))
        columns += tuple(f"one block, {w}: {what}" for w in ("v", "random") for what in WHAT[:2])
        return Table("Propagator, at the real strength and over one block", columns, rows)

    def tables(self) -> tuple[Table, ...]:
        """Return all three tables."""
        return self.table(), self.cross_table(), self.secant_table()


def propagator(case: Case, encoded: Sequence[Encoded], probes: int = PROBES) -> Propagator:
    """Push the stream at every depth and see what arrives at the last position of the final stream.

    The vector's direction of each layer is pushed there, at its own strength for the secant; its
    scope does not matter. `probes` are random directions per prompt and depth.
    """
    lm = case.lm
    parts = courses(lm, encoded)
    gradients = [pulled_back(lm, case.readout, part.batch) for part in parts]
    generator = torch.Generator().manual_seed(case.seed)
    layers, methods = [], set()
    for depth in range(lm.n_layers):
        pushed = [_push(case, part, depth, probes, generator) for part in parts]
        methods |= {method for _, method in pushed}
        arrived = {key: torch.cat([found[key] for found, _ in pushed]) for key in pushed[0][0]}
        own, last = (torch.cat([g[k][:, -1] for g in gradients]).double() for k in (depth, -1))
        layers.append(_layer(depth_name(depth), arrived, own, last, case.seed))
    method = "difference" if "difference" in methods else "jvp"
    return Propagator(case.vector.label, len(encoded), probes, method, lm.d_model, tuple(layers))


Arrived = dict[tuple[str, str], Tensor]


def _push(
    case: Case, part: Course, depth: int, probes: int, generator: torch.Generator
) -> tuple[Arrived, str]:
    """Carry the vector and the probes of one batch from one depth; what arrived, and the method.

    Per kind of direction and way of pushing it: gain, cosine and departure `[rows, 3]`, means over
    directions. Under "rest" the mean squares that the Frobenius norms are made of, `[rows]`.
    """
    lm, vector, hidden = case.lm, case.vector, part.hidden(depth)
    drawn = torch.randn(probes, len(hidden), lm.d_model, generator=generator)
    # Uniform on the sphere of radius sqrt(d): E z z^T = I.
    units = drawn / drawn.norm(dim=-1, keepdim=True)
    rows = {"random": slice(None)}
    direction = direction_at(vector, depth)
    if direction is not None:
        units = torch.cat([direction.expand(1, len(hidden), -1), units])
        rows = {"vector": slice(1), "random": slice(1, None)}
    everywhere = units.to(hidden)[:, :, None] * part.real
    last = torch.zeros_like(everywhere)
    last[:, :, -1] = everywhere[:, :, -1]
    pushes = torch.cat([last, everywhere])
    arrived, method = carried(lm, part, depth, pushes)
    same, broadcast = arrived[-1].chunk(2)
    ways = {"same": same, "broadcast": broadcast, "cross": broadcast - same}
    found: Arrived = {
        (who, way): _compared(units[at], moved[at])
        for who, at in rows.items()
        for way, moved in ways.items()
    }
    near = arrived[1].chunk(2)[0]
    found |= {("one_block", who): _compared(units[at], near[at]) for who, at in rows.items()}
    scale = vector.strength * vector.scales.get(depth - 1, 0.0)
    if direction is not None and scale:
        ends = (secant(lm, part, depth, scale * pushes)[-1] / scale).chunk(2)
        for way, moved in zip(("same", "broadcast"), ends, strict=True):
            found["secant", way] = _compared(units[:1], moved[:1])
            found["secant", f"random {way}"] = _compared(units[1:], moved[1:])
    # Unit probes: E |(J - I) u|^2 = |J - I|_F^2 / d already.
    for way, rest in (("same", same - units), ("cross", ways["cross"])):
        found["rest", way] = rest[rows["random"]].double().square().sum(-1).mean(0)
    final, start = (part.hidden(k)[:, -1].float().norm(dim=-1) for k in (lm.n_layers, depth))
    found["growth", ""] = (final / start.clamp_min(TINY)).cpu()
    return found, method


def _compared(units: Tensor, moved: Tensor) -> Tensor:
    u, m = units.double(), moved.double()
    gain = m.norm(dim=-1)
    cosine = (u * m).sum(-1) / gain.clamp_min(TINY)
    return torch.stack([gain, cosine, (m - u).norm(dim=-1)], dim=-1).mean(0)


def _layer(site: str, arrived: Arrived, own: Tensor, last: Tensor, seed: int) -> PropagatorLayer:
    def some(who: str, ways: Sequence[str]) -> dict[str, Carried]:
        known = {way: arrived[who, way] for way in ways if (who, way) in arrived}
        return {k: Carried(*(Estimate.of(v, seed) for v in x.T)) for k, x in known.items()}

    product = own.norm(dim=-1) * last.norm(dim=-1)
    return PropagatorLayer(
        site=site,
        growth=Estimate.of(arrived["growth", ""], seed),
        vector=some("vector", KINDS),
        random=some("random", KINDS),
        one_block=some("one_block", ("vector", "random")),
        secant=some("secant", SECANTS),
        same_frobenius=_frobenius(arrived["rest", "same"]),
        cross_frobenius=_frobenius(arrived["rest", "cross"]),
        backward_cosine=Estimate.of((own * last).sum(-1) / product.clamp_min(TINY), seed),
        backward_gain=Estimate.of(own.norm(dim=-1) / last.norm(dim=-1).clamp_min(TINY), seed),
    )


def _frobenius(squares: Tensor) -> Frobenius:
    """The root of a mean over prompts; its error by the delta method, nan for a single prompt."""
    value = float(squares.mean().sqrt())
    if len(squares) < 2:
        return Frobenius(value, float("nan"))
    error = float(squares.std()) / len(squares) ** 0.5
    return Frobenius(value, error / (2 * value) if value else 0.0)


def _cells(one: Carried | None) -> tuple[str, str, str]:
    if one is None:
        return ABSENT, ABSENT, ABSENT
    return one.gain.cell, one.cosine.cell, one.departure.cell


def _means(one: Carried) -> tuple[str, str, str]:
    return number(one.gain.mean), number(one.cosine.mean), number(one.departure.mean)
