"""What every descent over slots shares: its result, its randomness, the moves of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.prompts.task.constraints import Bound
from trimtab.prompts.task.rows import Slot


@dataclass(frozen=True)
class Descent:
    """A slot that was made better step by step.

    Attributes:
        method: `hotflip` or `gcg`.
        ids: The best legal slot found.
        text: Its text.
        loss: Its exact loss.
        curve: The best loss after repair and after each step from then on; it never rises.
        violated_start: What the start violated, by kind; empty where it was legal.
        violations_start: The sum of that.
        repair_steps: Replacements made until nothing was violated.
        flips: Accepted replacements of one token.
        swaps: Accepted changes of two tokens at once.
        restarts: Times it continued from the buffer or from a random kick.
        scored: Candidates given to the kernel.
        model_calls: Calls of the model, a gradient counted as one; those of steps that an interruption
            lost are not counted.
        stopped: Why: `steps`, `patience`, or `exhausted` (no legal candidate left).
    """

    method: str
    ids: Slot
    text: str
    loss: float
    curve: tuple[float, ...]
    violated_start: Mapping[str, int]
    violations_start: int
    repair_steps: int
    flips: int
    swaps: int
    restarts: int
    scored: int
    model_calls: int = field(compare=False)
    stopped: str


def seeded(seed: int, key: object) -> torch.Generator:
    """The generator of one step: a function of both, so that no running state has to be kept."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def replaced(slot: Slot, position: int, token: int) -> Slot:
    """The slot with another token at a position."""
    return (*slot[:position], token, *slot[position + 1 :])


def ranked(bound: Bound, scores: Tensor, count: int) -> list[int]:
    """Allowed tokens of lowest score `[vocab]`, at most `count`, best first."""
    masked = scores.detach().cpu().masked_fill(~bound.allowed[: len(scores)], float("inf"))
    count = min(count, int(bound.allowed[: len(scores)].sum()))
    return masked.topk(count, largest=False).indices.tolist()
