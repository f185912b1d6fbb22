"""Nulls: what a direction of no meaning does when it is pushed just as hard."""

from __future__ import annotations

from dataclasses import replace
from typing import overload

import torch

from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled, WeightSteering


@overload
def random_null(vector: VectorSteering, seed: int) -> VectorSteering: ...
@overload
def random_null(vector: WeightSteering, seed: int) -> WeightSteering: ...
def random_null(vector: Scaled, seed: int) -> Scaled:
    """Return the same steering along random unit directions, uniform on the sphere.

    Layers, raw alphas, scope, site and operation stay, so the two differ in direction alone. Every
    layer draws its own direction, in the order of depth, whichever layers are active. Of a low-rank
    update each column of B is drawn, at its length, and A stays: it acts on the same tokens as much.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(vector, WeightSteering):
        left = {}
        for writer, b in sorted(vector.left.items()):
            drawn = torch.randn(b.shape, generator=generator, dtype=torch.float64)
            left[writer] = drawn / drawn.norm(dim=0) * b.double().norm(dim=0)
        made = {**vector.provenance, "method": "random null", "null_seed": seed}
        return replace(vector, left=left, provenance=made)
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
