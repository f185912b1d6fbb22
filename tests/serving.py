"""Vectors as a server registers them, for the tests of `trimtab.serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.serve import Served, Term, VectorRegistry
from trimtab.steering.vector import VectorSteering


def served(lm: Any) -> Served:
    return Served("tiny", lm.n_layers, lm.d_model, lm.fingerprint)


def direction(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)


def vector(lm: Any, layers: Sequence[int] = (1,), seed: int = 0, **more: Any) -> VectorSteering:
    given = {layer: direction(lm.d_model, seed + layer) for layer in layers}
    return VectorSteering.from_directions(lm, given, alpha=2.0, **more)


def term(column: int, strength: float, scope: str) -> Term:
    return Term(column, strength, scope, f"digest{column}")


def fill(folder: Path, lm: Any) -> VectorRegistry:
    """Two vectors in a folder: `mood` behind blocks 1 and 2, `tone` before blocks 0 and 3."""
    vector(lm, (1, 2)).at(1.5).save(folder / "mood.safetensors")
    vector(lm, (0, 3), seed=5, site="resid_pre", scope="last").save(folder / "tone.safetensors")
    return VectorRegistry.read(folder, served(lm))
