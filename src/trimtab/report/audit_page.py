"""The page of an audit: gaps by prompt, first tokens, radii by depth, and what closing costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from trimtab.margins.audit import AuditReport
from trimtab.margins.census import Census
from trimtab.margins.close import KlToClose
from trimtab.margins.gap import GapReport
from trimtab.report.figures import Band, Bars, Figure, Series, bar_figure, line_figure
from trimtab.report.page import Section, write_page
from trimtab.results.tables import number

T = TypeVar("T")
BINS = 24
SHARES = (("toward", "--vector"), ("away", "--prompt"), ("neither", "--baseline"))
COLORS = ("--vector", "--prompt")
DASHES = ("solid", "dash")
UNREAD = 0.25  # share of answers outside both sets from which a gap is doubtful


def write_audit_page(folder: str | os.PathLike[str], report: AuditReport) -> Path:
    """Write the audit as a page that opens offline and return its path."""
    about = report.audited
    lead = f"{about.behavior} on {about.model}, {about.split} split"
    if report.compared is not None:
        lead += f", against {report.compared.other}"
    return write_page(folder, audit_sections(report), title="Audit of a margin", lead=lead)


def audit_sections(report: AuditReport) -> list[Section]:
    """Return the sections in the order they are read."""
    parts = (_gap_section, _census_section, _resolution_section, _radius_section, _close_section)
    return [part(report) for part in parts]


def _gap_section(report: AuditReport) -> Section:
    gaps = _both(report, report.gap, "gap")
    tables = [table for one in gaps.values() for table in (one.table(), one.units_table())]
    if report.compared is not None:
        tables.insert(0, report.compared.table())
    paragraphs = [report.gap.sign]
    cap = report.gap.soft_cap
    if cap is not None:
        paragraphs.append(
            f"This model caps its logits at {number(cap)}, which compresses gaps; the gap before "
            "the cap stands beside it."
        )
    return Section(
        title="Gap over prompts",
        paragraphs=tuple(paragraphs),
        figures=tuple(_histogram(gaps, side) for side in report.gap.sides),
        tables=tuple(tables),
    )


def _histogram(gaps: Mapping[str, GapReport], side: str) -> Figure:
    """Draw how the gaps of one list of prompts are distributed, checkpoints over each other."""
    found = {
        name: torch.tensor(one.sides[side].values[one.aggregator]) for name, one in gaps.items()
    }
    pooled = torch.cat(list(found.values()))
    low, high = float(pooled.min()), float(pooled.max())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1)
    lines, said = [], []
    for index, (name, values) in enumerate(found.items()):
        counts = torch.histc(values.float(), BINS, low, high) / len(values)
        # Each bin is a step: both of its edges at its height, and down to 0 at the ends.
        x = edges.repeat_interleave(2)
        y = torch.cat([torch.zeros(1), counts.repeat_interleave(2), torch.zeros(1)])
        lines.append(Series(name, x, y, COLORS[index]))
        q = gaps[name].sides[side].gap
        said.append(f"{name}: median {number(q.median)}, from {number(q.p5)} to {number(q.p95)}")
    aggregator = next(iter(gaps.values())).aggregator
    return line_figure(
        f"gap of {side} prompts, {aggregator}, nats",
        "share of prompts",
        lines,
        description=f"Gaps of {side} prompts. " + "; ".join(said) + " (5th to 95th percentile).",
        caption=f"{side} prompts",
        height=260,
    )


def _census_section(report: AuditReport) -> Section:
    census = _both(report, report.census, "census")
    warnings = [
        f"{name}: {number(100 * one.neither.share, 0)} % of {side} answers open with a token of "
        "neither set; the gap says little about them. Learned sets may do better (--learn-sets)."
        for name, found in census.items()
        for side, one in found.sides.items()
        if side in ("toward", "away") and one.neither.share > UNREAD
    ]
    return Section(
        title="Census of first tokens",
        paragraphs=(
            "The likeliest first token of each answer: in the toward set, in the away set, or in "
            "neither. 95 % intervals are exact binomial ones.",
        ),
        figures=tuple(_census_bars(name, one) for name, one in census.items()),
        tables=tuple(one.table() for one in census.values()),
        warnings=tuple(warnings),
    )


def _census_bars(name: str, census: Census) -> Figure:
    bars = []
    for share, color in SHARES:
        found = [getattr(one, share) for one in census.sides.values()]
        title = share if share == "neither" else f"{share} set"
        bars.append(Bars(title, [(one.share, one.low, one.high) for one in found], color))
    labels = [f"{side} prompts" for side in census.sides]
    return bar_figure(labels, "share of prompts", bars, caption=name)


def _resolution_section(report: AuditReport) -> Section:
    found = _both(report, report.resolution, "resolution")
    same = len({one.rows for one in found.values()}) == 1
    shown = [report.resolution] if same else list(found.values())
    lost = [f"Not read at all: {', '.join(one.lost)}." for one in shown if one.lost]
    return Section(
        title="What the readout words became",
        paragraphs=(
            "An answer's first token is read, so of a phrase only its first token counts, with and "
            "without a space in front and with either apostrophe.",
        ),
        tables=tuple(one.table() for one in shown),
        warnings=tuple(lost),
    )


def _radius_section(report: AuditReport) -> Section:
    found = _both(report, report.radius, "radius")
    lines, bands = [], []
    for (name, one), dash in zip(found.items(), DASHES, strict=False):
        for side, color in zip(one.sides, COLORS, strict=False):
            layers = [entry.layer for entry in one.sides[side]]
            radii = [entry.relative for entry in one.sides[side]]
            label = f"{side} prompts" if len(found) == 1 else f"{name}, {side} prompts"
            lines.append(Series(label, layers, [r.median for r in radii], color, dash))
            ends = [r.p25 for r in radii], [r.p75 for r in radii]
            bands.append(Band(f"{side}, middle half", layers, *ends))
    figure = line_figure(
        "layer",
        "gap / |gradient|, over the stream's norm",
        lines,
        bands=bands if len(found) == 1 else (),
    )
    return Section(
        title="First-order radius",
        paragraphs=(
            "How far the stream after a layer would have to move, at the last prompt position, for "
            "the gap to vanish if the model were linear there: gap / |gradient of the gap|. Any "
            "factor on the logits cancels. Medians; shaded from quartile to quartile.",
        ),
        figures=(figure,),
        tables=tuple(one.table() for one in found.values()),
    )


def _close_section(report: AuditReport) -> Section:
    found = _both(report, report.kl_to_close, "kl_to_close")
    return Section(
        title="KL to close the gap",
        paragraphs=(
            "The last prompt position is pushed along a direction until the gap crosses zero; the "
            "price is KL(unsteered, steered) at the first answer position. 'gradient' is each "
            "prompt's own direction, 'shared' one vector from train prompts. The random control, "
            "random directions of the same length, stands beside them.",
        ),
        figures=tuple(_close_bars(name, one) for name, one in found.items()),
        tables=tuple(one.table() for one in found.values()),
    )


def _close_bars(name: str, closing: KlToClose) -> Figure:
    rows = closing.rows
    kl = [(row.kl.median, row.kl.p25, row.kl.p75) for row in rows]
    return bar_figure(
        [f"{row.side} prompts, {row.lever}" for row in rows],
        "KL at the first answer position, nats (median, quartiles)",
        [
            Bars("where the gap is closed", kl, "--damage"),
            Bars("random control of that length", [row.null_kl for row in rows], "--null"),
        ],
        caption=f"{name}, layer {closing.layer}",
    )


def _both(report: AuditReport, mine: T, part: str) -> dict[str, T]:
    """A part of the audited model, and of the one it is compared with."""
    found = {report.audited.model: mine}
    if report.compared is not None:
        found[report.compared.other] = getattr(report.compared, part)
    return found
