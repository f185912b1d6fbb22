"""Batches: prompts of one forward pass, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    @property
    def position_ids(self) -> Tensor:
        """Absolute positions `[batch, seq]`; the first token is 0, and so is padding."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


def make_batches(
    encoded: Sequence[Encoded], pad_id: int, max_tokens: int = 8192, max_rows: int = 128
) -> Iterator[Batch]:
    """Group prompts of similar length, longest first: a batch that is too large shows at once.

    Args:
        encoded: The prompts.
        pad_id: Token to pad with; masked, so any will do.
        max_tokens: Most tokens of a batch, padding counted; a single longer prompt is a batch of
            its own.
        max_rows: Most prompts of a batch.
    """
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].ids))
    start = 0
    while start < len(order):
        width = len(encoded[order[start]].ids)
        count = max(1, min(max_rows, max_tokens // width))
        yield _pad(encoded, order[start : start + count], width, pad_id)
        start += count


def _pad(encoded: Sequence[Encoded], rows: list[int], width: int, pad_id: int) -> Batch:
    chosen = [encoded[row] for row in rows]
    gaps = [width - len(item.ids) for item in chosen]
    return Batch(
        input_ids=torch.tensor(
            [[pad_id] * gap + item.ids for gap, item in zip(gaps, chosen, strict=True)]
        ),
        attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
        prompt_length=torch.tensor([item.prompt_length for item in chosen]),
        instruction_end=torch.tensor([item.instruction_end for item in chosen]),
        rows=torch.tensor(rows),
    )
