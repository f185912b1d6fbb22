"""Steering written into the weights: checkpoints that need neither hooks nor this library."""

from trimtab.weights.bake import BakeReport, bake

__all__ = ["BakeReport", "bake"]
