"""Reads a steering file back into the lever that it holds."""

from __future__ import annotations

import os
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.steering.format import VectorHeader, WeightsHeader, defect, read
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering


def load_steering(path: str | os.PathLike[str]) -> VectorSteering | PromptSteering | WeightSteering:
    """Read one steering file; anything missing, surplus, damaged or not finite is refused.

    Raises:
        TrimtabError: no such file, not a steering file, another version, or damaged.
    """
    header, tensors = read(path)
    try:
        if isinstance(header, VectorHeader):
            return VectorSteering.from_parts(header, tensors)
        if isinstance(header, WeightsHeader):
            return WeightSteering.from_parts(header, tensors)
        return PromptSteering.from_parts(header, tensors)
    except TrimtabError as error:
        raise defect(path, f"{error.found} where {error.asked} was expected") from error


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a steering file holds as plain JSON-able values, without its tensors.

    Per-layer values have the layer number as a key; `alphas` are raw, at the strength stored.
    """
    steering = load_steering(path)
    if isinstance(steering, PromptSteering):
        soft = steering.vectors is not None
        return {
            "name": steering.label,
            "kind": "soft_prompt" if soft else "prompt",
            "text": steering.text,
            "slot": steering.slot,
            "separator": steering.separator,
            "tokens": len(steering.vectors) if steering.vectors is not None else None,
            "strength": steering.strength,
            "provenance": steering.provenance,
        }
    if isinstance(steering, WeightSteering):
        return {
            "name": steering.label,
            "kind": "weights",
            "behavior": steering.provenance.get("behavior"),
            "method": steering.provenance.get("method"),
            "writers": steering.site,
            "rank": steering.rank,
            "strength": steering.strength,
            "model": steering.model_name,
            "fingerprint": steering.fingerprint,
            "provenance": steering.provenance,
        }
    return {
        "name": steering.label,
        "kind": "vector",
        "behavior": steering.provenance.get("behavior"),
        "method": steering.provenance.get("method"),
        "operation": steering.operation,
        "site": steering.site,
        "scope": str(steering.scope),
        "layers": list(steering.layers),
        "found_layers": list(steering.directions),
        "strength": steering.strength,
        "alphas": steering.alphas,
        "norms": steering.norms,
        "class_gaps": steering.class_gaps,
        "spreads": steering.spreads,
        "model": steering.model_name,
        "fingerprint": steering.fingerprint,
        "n_layers": steering.n_layers,
        "d_model": steering.d_model,
        "provenance": steering.provenance,
    }
