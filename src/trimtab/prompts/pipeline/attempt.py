"""One prompt that one arm of a search found in one restart, and what it cost."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.models.hooking import Hooks

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel

# A backward pass costs about twice its forward pass (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
BACKWARD = 2
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
        tokens: fed to the model for it, see `Cost`; of a stage, the stage alone.
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


@dataclass
class Cost:
    """A running count.

    Attributes:
        calls: calls of the model, a whole batch each; gradient passes count once.
        tokens: token positions fed, padding counted; those of a pass that is differentiated count
            three times, for its backward pass.
        seconds: on the clock.
    """

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


@contextmanager
def costing(lm: LanguageModel) -> Iterator[Cost]:
    """Count what is fed to the model inside the block."""
    cost, began = Cost(), time.perf_counter()

    def count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        fed = next(value for value in given if isinstance(value, torch.Tensor))
        cost.calls += 1
        cost.tokens += fed.shape[0] * fed.shape[1] * (1 + BACKWARD * torch.is_grad_enabled())

    with Hooks() as hooks:
        hooks.calls(lm.sites.trunk, before=count)
        try:
            yield cost
        finally:
            cost.seconds = time.perf_counter() - began


def pack(vectors: Tensor) -> dict[str, Any]:
    """Return float32 vectors as JSON: their bytes in base64, and their shape."""
    values = vectors.detach().float().cpu().contiguous()
    text = base64.b64encode(values.numpy().tobytes()).decode("ascii")
    return {"shape": list(values.shape), "float32": text}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Read what `pack` wrote."""
    values = torch.frombuffer(bytearray(base64.b64decode(packed["float32"])), dtype=torch.float32)
    return values.reshape(packed["shape"]).clone()
