"""The geometry of behaviors, measured: is the stream's propagator the identity, is a behavior low rank?

- propagator: every depth of the built-in model (three behaviors) and of twelve random
  architectures: gain, cosine and departure of J v beside random directions, |J - I|_F / |I|_F,
  across positions, and backward.
- positions, linearity: shares of the gap's gradient, and how far a replaced token goes beyond first
  order, built-in model.
- rank, functional rank, feasibility: all seven built-in behaviors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from common import arguments, emit
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.feasibility import FeasibilityRow
from trimtab.mechanism.geometry.geometry import GeometryReport, geometry
from trimtab.mechanism.geometry.linearity import linearity
from trimtab.mechanism.geometry.propagator import Propagator, propagator
from trimtab.mechanism.geometry.rank import MEASURES
from trimtab.methods import find
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.results.quantiles import Estimate
from trimtab.results.tables import to_plain
from trimtab.steering.vector import VectorSteering

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import planted  # noqa: E402
import tiny  # noqa: E402

BEHAVIORS = ("refusal", "topic", "mood", "register", "length", "truth", "agreement")
EDITED = 24  # prompts for token edits


def short(value: Estimate) -> list[float]:
    """A mean and its interval."""
    return [figure(x) for x in (value.mean, value.low, value.high)]


def figure(value: float) -> float:
    """Four digits are more than the intervals allow."""
    return float(f"{value:.4g}")


def propagator_row(name: str, behavior: str, found: Propagator) -> dict[str, object]:
    """Every depth, in figures: gain, cosine and departure, each [mean, low, high] for the vector."""
    depths = {}
    for one in found.layers:
        depths[one.site] = {
            "norm_growth": figure(one.growth.mean),
            "frobenius_se": [figure(one.same_frobenius.value), figure(one.same_frobenius.error)],
            "cross_frobenius_se": [
                figure(one.cross_frobenius.value),
                figure(one.cross_frobenius.error),
            ],
            "backward_cosine": short(one.backward_cosine),
            "backward_gain": short(one.backward_gain),
            "vector": {
                kind: [short(c.gain), short(c.cosine), short(c.departure)]
                for kind, c in one.vector.items()
            },
            "random": {
                kind: [figure(x.mean) for x in (c.gain, c.cosine, c.departure)]
                for kind, c in one.random.items()
            },
            "secant": {
                kind: [figure(x.mean) for x in (c.gain, c.cosine, c.departure)]
                for kind, c in one.secant.items()
            },
        }
    return {"name": f"propagator: {name}, {behavior}", "method": found.method, "depths": depths}


def random_architectures() -> list[dict[str, object]]:
    """The propagator of twelve tiny random models, where nothing was learned."""
    rows = []
    behavior = planted.behavior(readout={"toward": ["Z"], "away": ["Q"]})
    for architecture in tiny.ARCHITECTURES:
        lm = tiny.language_model(architecture)
        generator = torch.Generator().manual_seed(0)
        drawn = {k: torch.randn(lm.d_model, generator=generator) for k in range(lm.n_layers)}
        vector = VectorSteering.from_directions(lm, drawn, alpha=0.2)
        encoded = [lm.encode(e.prompt) for e in (*behavior.toward[:4], *behavior.away[:4])]
        found = propagator(Case(lm, behavior, vector), encoded, probes=8)
        rows.append(propagator_row(lm.name, "random vector", found))
    return rows


def behavior_row(name: str, report: GeometryReport, seconds: float) -> dict[str, object]:
    """What one behavior's report says, the propagator apart."""
    return {
        "name": f"geometry: {name}",
        "cpu_seconds": figure(seconds),
        "layer": report.measured.layer,
        "findings": list(report.findings),
        "positions": {
            f"{row.slot}/{row.group}": {
                "share": short(row.share),
                "uniform": figure(row.uniform),
                "through_attention": figure(row.through_attention.mean),
            }
            for row in report.positions.rows
        },
        "crossing": {
            slot: [figure(one.mean) for one in values]
            for slot, values in report.positions.crossing.items()
        },
        "gap_change": {k: short(v) for k, v in report.positions.gap_change.items()},
        "ranks": {
            f"{row.what} {row.site}": {
                **{
                    what: [figure(x) for x in (one.value, one.error, one.null)]
                    for what, one in ((m, getattr(row, m)) for m in MEASURES)
                },
                "above_null": row.above_null,
            }
            for row in report.ranks.rows
        },
        "functional": {
            f"{row.mode}/{row.basis}": {
                "full": short(row.full),
                "rank": [row.k, row.low, row.high],
                "curve": {str(point.k): figure(point.share.mean) for point in row.curve},
                "vector": figure(row.vector.mean),
            }
            for row in report.functional.rows
        },
        "feasibility": {row.side: push_row(row) for row in report.feasibility.rows},
    }


def push_row(row: FeasibilityRow) -> dict[str, object]:
    """One side's push."""
    return {
        "n": row.n,
        "feasible": row.feasible,
        "norm": figure(row.norm),
        "hardest_alone": figure(row.alone),
        "null": [figure(x) for x in (row.null, row.null_low, row.null_high)],
        "binding": row.binding,
        "works": row.works,
        "share_within": {str(w.radius): [w.count, w.bound] for w in row.within},
        "pushed": {
            f"{p.direction} x{p.factor:g}": {
                "train": [figure(x) for x in (p.train.share, p.train.low, p.train.high)],
                "test": [figure(x) for x in (p.test.share, p.test.low, p.test.high)],
                "test_kl": figure(p.test_kl),
            }
            for p in row.pushed
        },
    }


def edits_row(
    lm: LanguageModel, behavior: Behavior, vector: VectorSteering, layers: Sequence[int]
) -> dict[str, object]:
    """Linearity and token edits on more prompts than the report reads."""
    test = behavior.split(0).named("test")
    prompts = [e.prompt for side in (test.toward, test.away) for e in side[: EDITED // 2]]
    found = linearity(Case(lm, behavior, vector), prompts, layers)
    edits = found.edits
    return {
        "name": f"linearity: {behavior.name}",
        "radius": {
            f"{row.site} {row.direction}": {
                "radius": [
                    figure(x)
                    for x in (row.radius.median, row.radius.median_low, row.radius.median_high)
                ],
                "token_edit": figure(row.token_edit.median),
                "edit_over_radius": figure(row.edit_over_radius.median),
            }
            for row in found.rows
        },
        "edits": {
            "n": edits.n,
            "size": figure(edits.size.median),
            "linear_share": figure(edits.linear_share.median),
            "beyond": short(edits.beyond),
            "departure": figure(edits.departure.median),
            "correlation": figure(edits.correlation),
            "same_sign": short(edits.same_sign),
        },
    }


def main() -> None:
    options = arguments(__doc__ or "", repeats=1)
    lm = load("harbor", dtype=torch.float32)
    rows: list[dict[str, object]] = []
    for name in BEHAVIORS:
        behavior = load_behavior(name)
        vector = find(lm, behavior)
        started = time.process_time()
        report = geometry(Case(lm, behavior, vector))
        rows.append(behavior_row(name, report, time.process_time() - started))
        rows.append(propagator_row("harbor", name, report.propagator))
        rows.append(edits_row(lm, behavior, vector, [report.measured.layer]))
    rows += random_architectures()
    emit("geometry", cast("list[dict[str, object]]", to_plain(rows)), options.json)


if __name__ == "__main__":
    main()
