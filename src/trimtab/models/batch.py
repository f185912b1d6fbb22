"""Batches: prompts of one forward pass, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trimtab.models.chat import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one forward pass, padded on the left.

    Attributes:
        input_ids: `[batch, seq]`.
        attention_mask: 1 for a token, 0 for padding, `[batch, seq]`.
        prompt_length: Tokens before the answer's first, padding not counted, `[batch]`.
        instruction_end: Position of the first token after the last user text, `[batch]`.
        rows: Index of each row in the caller's sequence, `[batch]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: Tensor
    instruction_end: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, item.name).to(device) for item in fields(self)))

    def take(self, rows: Tensor) -> Batch:
        """Return some of the rows, by index or mask."""
        return Batch(*(getattr(self, item.name)[rows] for item in fields(self)))


def padded(encoded: Sequence[Encoded], rows: Sequence[int], width: int, pad_id: int) -> Batch:
    """One batch `width` wide; `rows` are the prompts' places in the caller's sequence."""
    gaps = [width - len(item.ids) for item in encoded]
    return Batch(
        input_ids=torch.tensor(
            [[pad_id] * gap + item.ids for gap, item in zip(gaps, encoded, strict=True)]
        ),
        attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
        prompt_length=torch.tensor([item.prompt_length for item in encoded]),
        instruction_end=torch.tensor([item.instruction_end for item in encoded]),
        rows=torch.tensor(rows),
    )
