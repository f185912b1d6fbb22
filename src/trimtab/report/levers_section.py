"""The page's part about levers: what each moves, what it breaks, what it costs, which to choose."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.levers.row import LeverRow
from trimtab.levers.table import LeversTable
from trimtab.report.figures import Bars, Figure, bar_figure
from trimtab.report.page import Section
from trimtab.results.tables import Table, number, percent


def levers_section(found: LeversTable) -> Section:
    """Draw scores and damage of every lever beside the unsteered model and the random control."""
    side = "toward" if found.sign > 0 else "away"
    return Section(
        f"Levers: {found.behavior}, {side}, within {found.budget:g} nats",
        paragraphs=(
            found.advice.sentence,
            "Found on train prompts, put at the largest strength whose 95th percentile of damage "
            "(on-target KL) keeps the budget on validation prompts, chosen there, scored on test prompts. What has "
            "no strength is shown with what it costs.",
        ),
        figures=(_scores(found.rows), _damage(found.rows, found.budget)),
        tables=(found.table(), _conversions(found.rows), _samples(found.rows)),
        warnings=tuple(_warned(found)),
    )


def _scores(rows: Sequence[LeverRow]) -> Figure:
    return bar_figure(
        [row.name for row in rows],
        "share of test answers",
        [
            Bars("behavior", [(row.score, row.low, row.high) for row in rows]),
            Bars("coherence", [row.coherence for row in rows], "--coherence"),
        ],
    )


def _damage(rows: Sequence[LeverRow], budget: float) -> Figure:
    return bar_figure(
        [row.name for row in rows],
        "nats per token, 95th percentile",
        [
            Bars("damage (on-target KL)", [row.damage_p95 for row in rows], "--damage"),
            Bars("budget", [budget] * len(rows), "--baseline"),
        ],
        caption="Strengths were chosen on validation prompts, so a bar may pass the budget a little.",
    )


def _conversions(rows: Sequence[LeverRow]) -> Table:
    """What each lever is, and what its conversion lost."""
    cells = tuple(
        (row.name, row.lever, row.limited_by, row.bakeable, number(row.residual, 6)) for row in rows
    )
    columns = ("lever", "what it is", "strength limited by", "bakeable", "residual")
    notes = (
        "residual: of the bias, largest logit difference after a reload over the steering's effect; "
        "of rank-1, the unexplained share on held-out tokens",
    )
    return Table("what each lever is", columns, cells, notes)


def _samples(rows: Sequence[LeverRow]) -> Table:
    cells = tuple(
        (row.name, str(sample.prompt), sample.before, sample.after)
        for row in rows
        for sample in row.samples[:1]
    )
    return Table("answers", ("lever", "prompt", "unsteered", "steered"), cells)


def _warned(found: LeversTable) -> list[str]:
    """Say where a figure invites a wrong reading."""
    warnings = [f"There is no {name}: {why}." for name, why in found.missing.items()]
    for row in found.rows:
        if row.gain > 0 and row.coherence < 0.5:
            warnings.append(f"{row.name}: the score rises while the text falls apart.")
        if row.kind == "baseline" or row.closed is None or row.closed.value - row.score < 0.25:
            continue
        warnings.append(
            f"{row.name}: the gap lies on the wanted side of {percent(row.closed.value)} of prompts, yet "
            f"only {percent(row.score)} of the answers show the behavior."
        )
    if found.advice.choice is None:
        warnings.append("No lever is usable within the budget.")
    return warnings
