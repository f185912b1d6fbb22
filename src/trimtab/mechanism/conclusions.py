"""What an explanation means for a user: one sentence a part, each with the choice it leads to.

Every sentence is put together from measured figures by the rules below; none is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trimtab.mechanism.circuits.attribution import AttributionSummary
from trimtab.mechanism.circuits.faithful import Circuit, Faithfulness
from trimtab.mechanism.circuits.interchange import Interchange
from trimtab.mechanism.frozen.freeze import FreezeTable
from trimtab.mechanism.geometry.geometry import IDENTITY, GeometryReport
from trimtab.mechanism.reading.value_vector import ValueVectors
from trimtab.mechanism.sparse.curve import SparsityCurve
from trimtab.mechanism.working import Working
from trimtab.results.tables import number

SMALL_LOSS = 10.0  # points: a part that costs less can be left out of an account
SLACK = 0.1  # of faithfulness, that other prompts may cost
HALF = 0.5
TELLING = 0.05
PARTS = {
    "qk": "attention patterns",
    "ov": "the values that attention moves",
    "svv": "the vector's own share of the values",
    "mlp_direct": "the vector's own share of what MLPs read",
    "mlp": "MLP outputs",
    "ov+mlp": "values and MLP outputs together",
}
SIDES = {1: "inducing", -1: "removing"}


@dataclass(frozen=True)
class Finding:
    """One sentence of an explanation: what it is about, what was measured, what a user may do."""

    part: str
    said: str
    choice: str


def conclusions(
    signs: Sequence[int],
    working: Working,
    edges: AttributionSummary,
    carried: Faithfulness | None,
    circuit: Circuit,
    frozen: FreezeTable,
    values: ValueVectors,
    sparsity: SparsityCurve,
    shape: GeometryReport,
    exchanged: Interchange | None = None,
) -> tuple[Finding, ...]:
    """Say what was found, part by part."""
    return (
        *_strength(working),
        _where(edges),
        _circuit(circuit, carried),
        *(_parts(frozen, sign) for sign in signs),
        _tokens(values),
        *(_sparse(sparsity, sign) for sign in signs),
        *_travels(shape),
        _directions(shape),
        *([] if exchanged is None else [_another(exchanged)]),
    )


def _strength(working: Working) -> Iterator[Finding]:
    """What is explained where the vector's own strength moves nothing."""
    if len(working.tried) == 1 and working.moves:
        return
    before, first = 100 * working.unsteered, 100 * working.tried[0].score
    own = f"At its own strength, m = {working.given:+.4g}, the vector scores {first:.0f} %"
    if not working.moves:
        most = max(abs(one.strength) for one in working.tried)
        yield Finding(
            "strength",
            f"{own} where the unsteered model scores {before:.0f} %, and no |m| tried up to "
            f"{most:.4g} does better by a fifth.",
            "What follows describes a push that does not move the behavior: try another method "
            "or other layers (trimtab find), then trimtab tune.",
        )
        return
    used = working.gain + working.unsteered
    yield Finding(
        "strength",
        f"{own}, the unsteered model {before:.0f} %; m = {working.used:+.4g} is the weakest of "
        f"{len(working.tried)} tried that comes near the best ({100 * used:.0f} %).",
        f"Explained here is m = {working.used:+.4g}. Set the strength you use with trimtab tune, "
        "which also keeps a budget of damage.",
    )


def _where(edges: AttributionSummary) -> Finding:
    """Which layers' writes carry most of the effect."""
    total = sum(abs(node.score) for node in edges.nodes) or 1.0
    by_layer: dict[str, float] = {}
    for node in edges.nodes:
        if node.kind != "steer":
            name = f"the {'MLP' if node.kind == 'mlp' else 'heads'} of layer {node.layer}"
            by_layer[name] = by_layer.get(name, 0.0) + abs(node.score) / total
    order = sorted(by_layer.items(), key=lambda item: -item[1])[:3]
    most = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in order)
    into = max(edges.into.items(), key=lambda item: item[1])
    return Finding(
        "where",
        f"Beside the vector itself, most of the effect passes {most}; the largest share of edges' "
        f"magnitude leads into the {into[0]} ({100 * into[1]:.0f} %).",
        f"To bake or to edit by hand, look at {order[0][0]} first."
        if order
        else "The vector reaches the logits directly: steer and bake it at this layer.",
    )


def _circuit(circuit: Circuit, carried: Faithfulness | None) -> Finding:
    share, best = circuit.share, max(one.value for one in circuit.random)
    held = circuit.held_out.value >= circuit.threshold - SLACK
    any_vector = "a random vector moves no token, so it has no edges"
    if carried is not None:
        any_vector = f"the highest edges of a random vector, as many, {number(carried.value)}"
    choice = "The circuit does not hold on other prompts: do not build on it."
    if held:
        choice = "The circuit holds on prompts it was not chosen on: an account in these edges is enough."
        if carried is not None and carried.value >= HALF * circuit.held_out.value:
            choice += " Most of it is the network's own: a shared circuit does not make two behaviors one."
    return Finding(
        "circuit",
        f"{100 * share:.1f} % of {circuit.n_edges} edges carry {number(circuit.held_out.value)} of "
        f"the effect on other prompts, as many random ones at most {number(best)}, all the others "
        f"{number(circuit.complement.value)}; {any_vector}.",
        choice,
    )


def _parts(frozen: FreezeTable, sign: int) -> Finding:
    """What freezing costs: the parts that can be ignored, and the one that matters most."""
    steered, base = frozen.row("steered", sign), frozen.row("unsteered", sign)
    side = SIDES[sign]
    gain = steered.score.value - base.score.value
    if gain < SMALL_LOSS:
        return Finding(
            f"freezing, {side}",
            f"Steering moves the score by {number(gain, 0)} points only: there is nothing to lose.",
            "Choose another strength (trimtab tune) before asking what carries it.",
        )
    rows = [row for row in frozen.rows if row.sign == sign]
    lost = {row.name: row.lost for row in rows if row.lost is not None}
    said = "; ".join(f"{PARTS.get(name, name)} {span.cell}" for name, span in lost.items())
    ignorable = {name for name, span in lost.items() if span.high <= SMALL_LOSS}
    most = max((name for name in lost if "+" not in name), key=lambda name: lost[name].value)
    choices = []
    if "qk" in ignorable:
        choices.append("Attention patterns (QK) can be ignored: caching the unsteered ones is safe")
    elif "qk" in lost and lost["qk"].value <= SMALL_LOSS:
        choices.append("Attention patterns (QK) seem to matter little: --max-prompts would tell")
    if lost[most].value >= HALF * gain:
        choices.append(f"It needs {PARTS[most]}: take care of them when pruning or quantizing")
    elif ignorable & {"qk", "svv", "mlp_direct"}:
        choices.append("No single part carries it: what is frozen is made up for elsewhere")
    return Finding(
        f"freezing, {side}",
        f"Of {number(gain, 0)} points gained, freezing loses: {said}.",
        ". ".join(choices) + "." if choices else "No part can be left out of an account.",
    )


def _tokens(values: ValueVectors) -> Finding:
    total, own, random = values.total, values.own, values.random
    clear = total.p is not None and total.p <= TELLING
    through = ", ".join(map(repr, total.promoted[:5]))
    said = (
        f"Through the heads the vector says {through} (a random one {_some(random.promoted)}); "
        f"read by itself it says {_some(own.promoted)}"
    )
    if total.p is not None:
        said += f"; the behavior's words beat random vectors with p = {number(total.p, 3)}"
    return Finding(
        "what it says",
        said + ".",
        "The value vectors name the behavior: they may be used to label a vector."
        if clear
        else "The tokens do not name the behavior more than chance does: do not label by them.",
    )


def _some(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:3]))


def _sparse(curve: SparsityCurve, sign: int) -> Finding:
    side = SIDES[sign]
    least = {order: curve.least(order, sign, True) for order in ("attribution", "random")}
    dense = next(point for point in curve.dense if point.sign == sign)
    if dense.score - curve.unsteered[sign] < SMALL_LOSS / 100:
        return Finding(
            f"sparsity, {side}",
            f"The whole vector scores {number(dense.score)} against {number(curve.unsteered[sign])} "
            "unsteered.",
            "It does not steer this way at this strength.",
        )
    kept, random = least["attribution"], least["random"]
    if kept is None:
        return Finding(
            f"sparsity, {side}",
            f"Already at {100 * max(p.share for p in curve.points):.0f} % of {curve.dimensions} "
            "dimensions, its norm restored, more than a tenth of the score is lost.",
            "Ship the whole vector.",
        )
    against = "none of the shares tried" if random is None else f"{100 * random:.0f} %"
    return Finding(
        f"sparsity, {side}",
        f"{100 * kept:.0f} % of {curve.dimensions} dimensions, chosen by attribution, keep nine tenths "
        f"of the score; chosen at random it takes {against}.",
        f"--sparsify {kept:g} ships a vector of that size.",
    )


def _travels(shape: GeometryReport) -> Iterator[Finding]:
    """How the vector arrives at the end of the network."""
    site = shape.functional.site
    one = next((row for row in shape.propagator.layers if row.site == site), None)
    own = None if one is None else one.vector.get("same")
    if one is None or own is None:
        return
    random = one.random["same"]
    alike = own.departure.mean <= IDENTITY
    yield Finding(
        "how it travels",
        f"From {site} to the end of the network the vector is made {number(own.gain.mean)} times as "
        f"long and turned to a cosine of {number(own.cosine.mean)} with itself (random directions "
        f"{number(random.gain.mean)} and {number(random.cosine.mean)}).",
        "It arrives as it was: it may be moved to a later layer."
        if alike
        else "It cannot be moved to another layer as it is: find it again there (trimtab find --layers).",
    )


def _directions(shape: GeometryReport) -> Finding:
    """How many directions of the stream hold the behavior's gap."""
    rank = shape.functional
    added, null = rank.row("added", "differences"), rank.row("added", "random")
    if math.isnan(added.k):
        return Finding(
            "how many directions",
            f"At {rank.site} the other side's whole state at the last position changes the first "
            f"token's odds by {added.full.cell} nats, which is not told from 0 in the direction expected.",
            "The behavior is not in the first token's readout: judge answers, not the gap.",
        )
    few, against = (
        f"{k:.0f}" if math.isfinite(k) else "more than tried" for k in (added.k, null.k)
    )
    return Finding(
        "how many directions",
        f"Directions, taken from differences of prompts, that change the first token's odds at "
        f"{rank.site} by nine tenths of what the other side's whole state does: {few} (random "
        f"directions: {against}).",
        "One direction is enough there: a vector or a rank-1 edit can do what any edit of this layer does."
        if added.k == 1
        else "One direction does not do it alone: compare with edits of higher rank (trimtab levers).",
    )


def _another(table: Interchange) -> Finding:
    """Whether another vector passes through the same edges: each one's circuit under the other."""
    runs, (this, other) = table.faithfulness, table.names
    crossed = [(runs[0][1], runs[1][1], table.random[1]), (runs[1][0], runs[0][0], table.random[0])]
    shared = all(
        swapped.value >= HALF * own.value and swapped.value > random.value
        for swapped, own, random in crossed
    )
    said = "; ".join(
        f"the circuit of {of} carries {number(swapped.value)} of the effect of {under} on other "
        f"prompts (its own {number(own.value)}, a random one {number(random.value)})"
        for (swapped, own, random), of, under in zip(
            crossed, (this, other), (other, this), strict=True
        )
    )
    return Finding(
        "another vector",
        f"{said[0].upper()}{said[1:]}. They share {number(table.overlap[0][1])} of the smaller's "
        f"edges (chance {number(table.chance[0][1])}); cosine of the vectors "
        f"{number(table.cosines[0][1])}.",
        "Both act through the same edges: what was learned of one circuit holds for the other."
        if shared
        else "They act through different edges: explain each by itself.",
    )
