"""The weights of a step's tokens: one buffer that never moves, read by the compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.serve.tokens import PHASES, Term, phases, places, weights


class StepWeights:
    """The strength of each vector at each token of the current step.

    Attributes:
        values: float32 `[most tokens + 1, vectors]` on the model's device. A row more than any step
            has, so that no graph is made for a step that fills it.
    """

    def __init__(self, most_tokens: int, vectors: int, device: torch.device) -> None:
        """Reserve the buffer; nothing is steered until `fill`."""
        self.vectors = vectors
        self.values = torch.zeros(most_tokens + 1, vectors, device=device)
        # What is written here reaches a GPU by a copy; on the CPU the two are one.
        own = device.type == "cpu"
        pinned = not own and torch.cuda.is_available()
        self._written = self.values if own else torch.zeros(self.values.shape, pin_memory=pinned)
        self._numpy = self._written.numpy()
        self._requests: list[str] = []
        self._tables = np.zeros((0, vectors), dtype=np.float32)
        self._steered = False
        self._dirty = 0

    def fill(
        self,
        requests: Sequence[str],
        terms: Callable[[str], Sequence[Term]],
        computed: npt.NDArray[np.integer],
        scheduled: npt.NDArray[np.integer],
        prompt_lengths: npt.NDArray[np.integer],
        fresh: bool,
    ) -> None:
        """Write the weights of a step's tokens.

        `computed` and `scheduled` count tokens of each request in earlier steps and in this one.
        `fresh` says that an id may stand for another request than it did in the last step.
        """
        if fresh or self._requests != requests:
            tables = [weights(terms(request), self.vectors) for request in requests]
            self._requests, self._tables = list(requests), np.concatenate(tables)
            self._steered = bool(self._tables.any())
        if self._steered:
            rows, positions = places(computed, scheduled)
            chosen = rows * PHASES + phases(positions, prompt_lengths[rows])
            tokens = len(rows)
            np.take(self._tables, chosen, axis=0, out=self._numpy[:tokens])
            # A shorter step leaves the rows of a longer one behind it as they were.
            self._dirty = max(self._dirty, tokens)
        elif self._dirty:
            tokens, self._dirty = self._dirty, 0
            self._numpy[:tokens] = 0.0
        else:
            return
        if self._written is not self.values:
            self.values[:tokens].copy_(self._written[:tokens], non_blocking=True)


def addition(values: Tensor, vectors: Tensor, hidden: Tensor) -> Tensor:
    """What is added to hidden states `[..., tokens, d_model]` after one block, in their dtype.

    Args:
        values: The weights of the step's tokens, see `StepWeights`.
        vectors: float32 `[vectors, d_model]`.
        hidden: The hidden states; a token without steering gets zeros, exactly.
    """
    return (values.narrow(0, 0, hidden.shape[-2]) @ vectors).to(hidden.dtype)
