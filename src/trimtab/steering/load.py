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
    facts = {"name": steering.label, "strength": steering.strength}
    if isinstance(steering, PromptSteering):
        soft = steering.vectors
        return facts | {
            "kind": "prompt" if soft is None else "soft_prompt",
            "text": steering.text,
            "slot": steering.slot,
            "separator": steering.separator,
            "tokens": None if soft is None else len(soft),
            "provenance": steering.provenance,
        }
    facts |= {name: steering.provenance.get(name) for name in ("behavior", "method")}
    if isinstance(steering, WeightSteering):
        facts |= {"kind": "weights", "writers": steering.site, "rank": steering.rank}
    else:
        named = ("operation", "site", "alphas", "norms", "class_gaps", "spreads")
        facts |= {
            "kind": "vector",
            "scope": str(steering.scope),
            "layers": list(steering.layers),
            "found_layers": list(steering.directions),
            **{name: getattr(steering, name) for name in (*named, "n_layers", "d_model")},
        }
    return facts | {
        "model": steering.model_name,
        "fingerprint": steering.fingerprint,
        "provenance": steering.provenance,
    }
