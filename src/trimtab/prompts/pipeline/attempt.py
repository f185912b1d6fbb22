"""One prompt that one arm of a search found in one restart."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# In the order of tables. The first three are the stages of the pipeline.
STAGES = ("soft", "projected", "repaired")
BASELINES = ("nearest", "hotflip_random", "hotflip_reference", "gcg", "random", "reference")
ARMS = (*STAGES, *BASELINES)
TITLES = {
    "soft": "soft prefix",
    "projected": "projected to tokens",
    "repaired": "repaired (the pipeline)",
    "nearest": "nearest neighbors only",
    "hotflip_random": "pure HotFlip, random start",
    "hotflip_reference": "pure HotFlip, reference start",
    "gcg": "GCG, random start",
    "random": "random tokens",
    "reference": "the reference itself",
}


@dataclass(frozen=True)
class Attempt:
    """What one arm ended with in one restart.

    Attributes:
        arm: one of `ARMS`.
        restart: number of the restart, from 0.
        ids: token ids; empty for vectors.
        text: theirs.
        train: loss on the training rows, as the arm itself measured it, nats per token.
        violated_start: what the start of a descent violated, by kind; for other arms what the
            prompt itself violates. Empty where it is legal.
        legal: whether the prompt keeps every constraint.
        validation: loss on the validation rows.
        test: loss on the test rows; read once, when everything has been chosen.
        tokens: fed to the model for it, see `trimtab.prompts.pipeline.cost`; of a stage, the stage alone.
        calls: of the model.
        details: steps, flips, the reason to stop.
        seconds: it took.
    """

    arm: str
    restart: int
    ids: tuple[int, ...]
    text: str
    train: float
    violated_start: Mapping[str, int]
    legal: bool
    validation: float = float("nan")
    test: float = float("nan")
    tokens: int = field(default=0, compare=False)
    calls: int = field(default=0, compare=False)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def name(self) -> str:
        """Arm and restart."""
        return f"{self.arm} {self.restart}"

    def to_entry(self) -> dict[str, Any]:
        """Return the attempt as a journal holds it."""
        entry = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **entry,
            "ids": list(self.ids),
            "violated_start": dict(self.violated_start),
            "details": dict(self.details),
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Attempt:
        """Read what `to_entry` wrote."""
        values = {name: entry[name] for name in cls.__dataclass_fields__}
        return cls(**{**values, "ids": tuple(entry["ids"])})


def pack(vectors: Tensor) -> dict[str, Any]:
    """Return float32 vectors as JSON: their bytes in base64, and their shape."""
    values = vectors.detach().float().cpu().contiguous()
    text = base64.b64encode(values.numpy().tobytes()).decode("ascii")
    return {"shape": list(values.shape), "float32": text}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Read what `pack` wrote."""
    values = torch.frombuffer(bytearray(base64.b64decode(packed["float32"])), dtype=torch.float32)
    return values.reshape(packed["shape"]).clone()
