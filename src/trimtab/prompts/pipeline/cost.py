"""What an arm of a search costs, in calls and tokens, counted alike for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trimtab.models.hooking import Hooks

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel

# A backward pass costs about twice its forward pass (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
BACKWARD = 2


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
