"""The record that a baked checkpoint carries: what was put in, in a form that programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.models.baked import read_record
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.weights.plan import Plan
from trimtab.weights.report import BakeReport


def record_of(
    plan: Plan,
    vectors: Sequence[VectorSteering | WeightSteering],
    report: BakeReport,
    base: Path,
) -> dict[str, Any]:
    """Return the record; that of a base which was baked itself is kept inside it."""
    facts = {k: v for k, v in report.to_dict().items() if k not in ("path", "plan")}
    return {
        "format": 1,
        "trimtab": __version__,
        "base_model": plan.model,
        "base_fingerprint": report.base_fingerprint,
        "base_architecture": plan.architecture,
        "steerings": [
            {
                "label": vector.label,
                **_acts(vector),
                "strength": vector.strength,
                "behavior": vector.provenance.get("behavior"),
                "method": vector.provenance.get("method"),
                "data_hash": vector.provenance.get("data_hash"),
            }
            for vector in vectors
        ],
        "extra_layers": plan.extra_layers,
        "changed_tensors": list(plan.changed),
        "steps": list(plan.steps),
        "checked": facts,
        "earlier": read_record(base),
    }


def _acts(lever: VectorSteering | WeightSteering) -> dict[str, Any]:
    if isinstance(lever, WeightSteering):
        facts = {"operation": "low rank", "site": lever.writers, "rank": lever.rank}
        return {**facts, "scope": "all", "alphas": {}}
    return {
        "operation": lever.operation,
        "site": lever.site,
        "scope": str(lever.scope),
        "alphas": {str(k): v for k, v in lever.alphas.items()},
    }
