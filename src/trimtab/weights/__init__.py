"""Steering written into the weights: checkpoints that need neither hooks nor this library."""

from trimtab.weights.bake import bake, plan
from trimtab.weights.inspect import CheckpointFacts, inspect_checkpoint
from trimtab.weights.plan import BakeReport, Plan
from trimtab.weights.routes.low_rank import at_every_writer
from trimtab.weights.soft.prompt import bake_prompt
from trimtab.weights.soft.value import SoftPrompt

__all__ = [
    "BakeReport",
    "CheckpointFacts",
    "Plan",
    "SoftPrompt",
    "at_every_writer",
    "bake",
    "bake_prompt",
    "inspect_checkpoint",
    "plan",
]
