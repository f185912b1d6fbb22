"""What a measurement costs: rows put through the model, whatever the batching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.autograd.forward_ad import unpack_dual

from trimtab.models.hooking import Hooks, first_tensor
from trimtab.models.model import LanguageModel


@dataclass
class Calls:
    """A running count.

    Attributes:
        rows: model calls: one row of one forward pass each, be it a whole prompt or one token of an
            answer. A batch of 8 is 8 calls, so batching alone saves none; a pass on dual numbers
            counts twice, and a pass that leaves out shared layers counts in full.
    """

    rows: int = 0


@contextmanager
def counting(lm: LanguageModel) -> Iterator[Calls]:
    """Count the calls of the model made inside the block."""
    calls = Calls()

    def count(args: tuple, kwargs: dict) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        calls.rows += next(int(value.shape[0]) for value in given if value is not None)

    def count_derivative(args: tuple, kwargs: dict, output: object) -> None:
        hidden = first_tensor(tuple(output.values()) if isinstance(output, dict) else output)
        if hidden is not None and unpack_dual(hidden).tangent is not None:
            calls.rows += int(hidden.shape[0])

    with Hooks() as hooks:
        hooks.calls(lm.sites.trunk, before=count, after=count_derivative)
        yield calls
