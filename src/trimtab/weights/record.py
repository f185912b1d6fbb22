"""The record that a baked checkpoint carries: what was put in, in a form that programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.models.baked import read_record
from trimtab.steering.weights import Scaled
from trimtab.weights.plan import Plan
from trimtab.weights.report import BakeReport


def record_of(
    plan: Plan, vectors: Sequence[Scaled], report: BakeReport, base: Path
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
                "operation": vector.operation,
                "site": vector.site,
                "scope": str(vector.scope),
                "strength": vector.strength,
                "alphas": {str(k): v for k, v in vector.alphas.items()},
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
