"""The page of an explanation: what carries a steering, for a reader who has not read the papers."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.mechanism.circuits.attribution import AttributionSummary
from trimtab.mechanism.circuits.faithful import Circuit
from trimtab.mechanism.circuits.interchange import Interchange
from trimtab.mechanism.conclusions import PARTS, SIDES
from trimtab.mechanism.explained import Explanation
from trimtab.mechanism.frozen.freeze import FreezeTable, Span
from trimtab.mechanism.geometry.geometry import GeometryReport
from trimtab.mechanism.reading.value_vector import ValueVectors
from trimtab.mechanism.sparse.curve import SparsityCurve, SparsityPoint
from trimtab.report.figures import Bars, Figure, Series, bar_figure, heat_figure, line_figure
from trimtab.report.page import Section, write_page
from trimtab.results.tables import number

ORDER_COLORS = {"attribution": "--vector", "magnitude": "--prompt", "random": "--null"}


def write_explain_page(folder: str | os.PathLike[str], found: Explanation) -> Path:
    """Write an explanation as a page that opens offline and return its path."""
    one = found.explained
    lead = (
        f"{one.vector} on {one.model}: added at {one.site} of layer"
        f"{'s' * (len(one.layers) > 1)} {', '.join(map(str, one.layers))}, scope {one.scope}"
    )
    return write_page(folder, explain_sections(found), title=f"Why {one.behavior} moves", lead=lead)


def explain_sections(found: Explanation) -> list[Section]:
    """Return the sections in the order they are read."""
    return [
        Section(
            title="In short",
            paragraphs=(
                "Each line is one measurement on prompts that nothing was chosen on, and what it "
                "means for somebody who wants to use the vector.",
            ),
            tables=(found.table(),),
        ),
        _where(found.attribution, found),
        _circuit(found.circuit, found),
        _frozen(found.frozen),
        _values(found.values),
        _sparse(found.sparsity),
        _geometry(found.geometry),
        *([] if found.exchanged is None else [_exchanged(found.exchanged)]),
    ]


def _where(edges: AttributionSummary, found: Explanation) -> Section:
    return Section(
        title="Where it acts",
        paragraphs=(
            "A transformer is a stream that attention heads and MLPs read and write. The steering adds "
            "to the stream once; every head and MLP above then writes something else than before. A "
            "score says how much of the change in the answer passes through what one of them writes: "
            "how much more it wrote, times how strongly the answer depends on that, averaged while the "
            "steering is turned up from nothing to full strength.",
            f"The answer's change is measured in logits: at each place where the steered and the "
            f"unsteered model would say different tokens, the lead of the first over the second. All of "
            f"it together is {number(edges.effect)} logits a response; the scores account for "
            f"{number(edges.completeness)} of it. A random vector of the same length moves its own "
            f"responses by {number(found.random_edges.effect)}.",
        ),
        figures=(_node_grid(edges),),
        tables=(edges.table(),),
    )


def _node_grid(edges: AttributionSummary) -> Figure:
    """Scores by layer: one column per head, then the MLP."""
    layers = sorted({node.layer for node in edges.nodes if node.kind != "steer"})
    heads = sorted({node.head for node in edges.nodes if node.head is not None})
    known = {(node.layer, node.head): node.score for node in edges.nodes if node.kind == "head"}
    mlps = {node.layer: node.score for node in edges.nodes if node.kind == "mlp"}
    grid = [[*(known.get((layer, head)) for head in heads), mlps.get(layer)] for layer in layers]
    most = max(
        (n for n in edges.nodes if n.kind != "steer"), key=lambda n: abs(n.score), default=None
    )
    named = "nothing above the steering"
    if most is not None:
        named = f"the {'MLP' if most.head is None else f'head {most.head}'} of layer {most.layer}"
    return heat_figure(
        [*(f"head {head}" for head in heads), "MLP"],
        [f"layer {layer}" for layer in layers],
        grid,
        x_label="",
        y_label="",
        value_label="score, logits",
        description=f"Scores of heads and MLPs by layer; the largest is {named}.",
        caption="How much of the change passes each head and MLP",
        diverging=True,
    )


def _circuit(circuit: Circuit, found: Explanation) -> Section:
    sizes = [100 * size / circuit.n_edges for size, _ in circuit.curve]
    return Section(
        title="How few connections it takes",
        paragraphs=(
            "An edge is one connection: from what a head or MLP (or the steering) writes to what a later "
            "one reads. To test a set of edges, every other edge is made to carry what it carries without "
            "steering. Faithfulness is the share of the change that is left: 1 is all of it.",
            f"The highest {circuit.size} edges by score, {100 * circuit.share:.1f} % of them, keep "
            f"{circuit.held_out.cell} on prompts they were not chosen on. {_of_random(found)}",
        ),
        figures=(
            line_figure(
                "edges kept, %",
                "faithfulness",
                [Series("highest by score", sizes, [value for _, value in circuit.curve])],
                caption="Where the size was chosen",
                height=280,
            ),
        ),
        tables=(circuit.table(),),
    )


def _of_random(found: Explanation) -> str:
    other = found.random_edges
    if other.carried is None:
        return "A random vector of the same length moves no token."
    return (
        f"A random vector has {100 * other.overlap:.0f} % of its highest tenth of edges in common with "
        f"this one, where chance gives {100 * other.chance:.0f} %, and as many of its highest edges keep "
        f"{other.carried.cell} of this vector's effect: so much of a circuit belongs to the network, not to "
        "the behavior."
    )


def _frozen(frozen: FreezeTable) -> Section:
    return Section(
        title="Through what it acts",
        paragraphs=(
            "The steered model answers again while one part of it is held at what the unsteered model "
            "does on the same tokens. What the behavior loses is what that part carries. Attention has "
            "two: where it looks (its patterns, QK) and what it moves (its values, OV). Beside each part "
            "stands its random control: a change of the same size in another direction.",
            "A part that can be frozen at no loss can be ignored, cached or pruned. Losses do not add up: "
            "what one part loses another may make up for.",
        ),
        figures=tuple(_freeze_bars(frozen, sign) for sign in frozen.prompts),
        tables=(frozen.table(),),
    )


def _freeze_bars(frozen: FreezeTable, sign: int) -> Figure:
    rows = [row for row in frozen.rows if row.sign == sign and row.lost is not None]
    return bar_figure(
        [PARTS.get(row.name, row.name) for row in rows],
        "points of the score lost",
        [
            Bars("frozen", [_ends(row.lost) for row in rows]),
            Bars("random control", [_ends(row.null) for row in rows], "--null"),
        ],
        caption=f"{SIDES[sign].capitalize()}, m = {frozen.strengths[sign]:+.3g}",
    )


def _ends(one: Span | None) -> tuple[float, float, float] | None:
    return None if one is None else (one.value, one.low, one.high)


def _values(values: ValueVectors) -> Section:
    return Section(
        title="What it says",
        paragraphs=(
            "A head that reads the steered stream moves a part of the steering into its output: its "
            "steering value vector. Read through the vocabulary it names tokens that become likelier "
            "(promoted) or less likely (suppressed). The line of a random vector shows what tokens look "
            "like that mean nothing; p is how often a random vector scores as well.",
        ),
        tables=(values.table(),),
    )


def _sparse(curve: SparsityCurve) -> Section:
    return Section(
        title="How sparse it can be",
        paragraphs=(
            f"The vector has {curve.dimensions} numbers. Each is scored by how much of the effect it "
            "carries; the lowest are set to zero, and the rest may be stretched to the old length. The "
            "random control keeps as many numbers, drawn at random.",
        ),
        figures=tuple(_sparse_lines(curve, sign) for sign in curve.strengths),
        tables=(curve.table(),),
    )


def _sparse_lines(curve: SparsityCurve, sign: int) -> Figure:
    lines: dict[tuple[str, bool], list[SparsityPoint]] = {}
    for point in sorted(curve.points, key=lambda p: p.share):
        if point.sign == sign:
            lines.setdefault((point.order, point.restored), []).append(point)
    dense = next(p.score for p in curve.dense if p.sign == sign)
    return line_figure(
        "dimensions kept, %",
        "score",
        [
            Series(
                order if restored else f"{order}, norm not restored",
                [100 * p.share for p in mine],
                [p.score for p in mine],
                ORDER_COLORS.get(order, "--baseline"),
                "solid" if restored else "dot",
            )
            for (order, restored), mine in lines.items()
        ],
        caption=f"{SIDES[sign].capitalize()}; whole vector {number(dense)}, random control "
        f"{number(curve.null[sign])}",
        log_x=True,
        height=300,
    )


def _geometry(shape: GeometryReport) -> Section:
    return Section(
        title="How linear it is",
        paragraphs=(
            "If the network handed a push on unchanged, a vector could be moved between layers, and a "
            "prompt, a vector and a weight edit would be one thing. J is what the network makes of a small "
            "push; J = I would be 'unchanged'. The gap is the lead of the behavior's first tokens over "
            "their opposites.",
            *shape.findings,
        ),
        tables=shape.tables()[1:],
    )


def _exchanged(table: Interchange) -> Section:
    return Section(
        title="Whether another vector takes the same way",
        paragraphs=(
            "Each vector's circuit is run under each vector: 1 off the diagonal means that the edges "
            "found for one are all that the other needs. Vectors that point different ways may still "
            "pass through the same edges, so the share of edges in common (and by chance) stands beside "
            "the cosine.",
        ),
        tables=(table.table(), table.overlap_table()),
    )
