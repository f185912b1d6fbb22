"""Nulls: what a direction of no meaning does when it is pushed just as hard."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trimtab.steering.vector import VectorSteering


def random_null(vector: VectorSteering, seed: int) -> VectorSteering:
    """Return the same steering along random unit directions, uniform on the sphere.

    Layers, raw alphas, scope, site and operation stay, so the two differ in direction alone. Every
    layer draws its own direction, in the order of depth, whichever layers are active.
    """
    generator = torch.Generator().manual_seed(seed)
    directions: dict[int, torch.Tensor] = {}
    for layer in sorted(vector.directions):
        drawn = torch.randn(vector.d_model, generator=generator, dtype=torch.float64)
        directions[layer] = (drawn / drawn.norm()).float()
    provenance = {**vector.provenance, "method": "random null", "null_seed": seed}
    # at() gives a plain vector: a tuned one would carry its report, which says nothing of the null.
    return replace(vector.at(vector.strength), directions=directions, provenance=provenance)


def null_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of `count` nulls of one measurement; other measurements draw others."""
    return [seed * 1_000_003 + index for index in range(count)]
