"""How much fits in one call of the model: asked for at first, and learnt from running out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from trimtab.errors import TrimtabError

Item = TypeVar("Item")
Result = TypeVar("Result")

# float32 logits, their exponentials and a gathered copy may stand in memory at once.
LOGIT_BYTES = 1 << 30
_COPIES = 3


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out: on a GPU by its class, on the CPU by its words."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in words for sign in ("out of memory", "DefaultCPUAllocator", "can't allocate memory")
    )


class Room:
    """The most token positions of one call, halved whenever memory runs out."""

    def __init__(self, max_tokens: int) -> None:
        self.asked = self.tokens = max_tokens

    def rows(self, columns: int, logits: int = 0) -> int:
        """How many rows of so many columns fit, each with so many logits; at least one."""
        fit = self.tokens // max(1, columns)
        if logits:
            # The share of the room that is left bounds the logits too.
            fit = min(fit, LOGIT_BYTES * self.tokens // (self.asked * 4 * _COPIES * logits))
        return max(1, fit)

    def over(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Result],
        columns: int,
        logits: int = 0,
    ) -> Iterator[Result]:
        """Work through items in batches; one that does not fit is tried again at half the size.

        An item is one row of a call, with so many token positions and numbers in its logits.

        Raises:
            TrimtabError: Not even one item fits.
        """
        start = 0
        while start < len(items):
            part = items[start : start + self.rows(columns, logits)]
            try:
                result = work(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise TrimtabError(
                        f"one row of {columns} tokens",
                        "more than the memory holds",
                        "use a smaller model, a lower precision or shorter rows",
                    ) from error
                # At most half of the batch that failed, whatever bounded it.
                rows = len(part) // 2
                while self.rows(columns, logits) > rows:
                    self.tokens //= 2
            else:
                start += len(part)
                yield result
                continue
            # Outside the handler, so that what the failed call left is free.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
