"""One prompt that one arm of a search found in one restart, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel

# A backward pass costs about twice its forward pass (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
BACKWARD = 2
# In the order of tables.
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
ARMS = tuple(TITLES)
STAGES = ARMS[:3]  # of the pipeline; the others are baselines


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


@dataclass
class Cost:
    """A running count: calls of the model, a whole batch each; token positions fed; seconds.

    Padding is counted. A pass that is differentiated is one call, but its tokens count three times,
    for its backward pass.
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
