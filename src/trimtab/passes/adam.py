"""Adam, the one loop by which vectors, mixtures and adapters are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError


def adam(
    tensors: Sequence[Tensor],
    gradients: Callable[[int], Sequence[Tensor] | None],
    *,
    what: str,
    steps: int,
    learning_rate: float,
    decay: bool = True,
    weight_decay: float = 0.0,
    after: Callable[[], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Run Adam on tensors in place and return how many steps were taken.

    Args:
        tensors: Leaves of the graph.
        gradients: From a step's number to each tensor's gradient; None to stop there.
        what: Is trained, for the error.
        steps: At most.
        learning_rate: Of the first step.
        decay: The rate falls to 0 linearly.
        weight_decay: Decoupled, as in AdamW.
        after: Called after each step.
        progress: Called with steps done and steps in all.

    Raises:
        TrimtabError: A gradient that is not finite.
    """
    optimizer = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=weight_decay)
    for step in range(steps):
        found = gradients(step)
        if found is None:
            return step
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            raise TrimtabError(
                asked=what,
                found=f"a loss that is not finite at step {step}",
                advice="load the model in float32 or bfloat16, or lower the learning_rate",
            )
        for tensor, gradient in zip(tensors, found, strict=True):
            tensor.grad = gradient.to(tensor.dtype)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps if decay else 1)
        optimizer.step()
        if after is not None:
            after()
        if progress is not None:
            progress(step + 1, steps)
    return steps
