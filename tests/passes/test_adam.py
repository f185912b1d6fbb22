"""The training loop is torch's Adam, step for step."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.passes.adam import adam

TARGET = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay: bool, weight_decay: float) -> None:
    mine, given = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    seen: list[tuple[int, int]] = []

    def gradients(step: int) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((mine - TARGET).square().sum() * (step + 1), mine)

    taken = adam(
        [mine],
        gradients,
        what="a vector",
        steps=5,
        learning_rate=0.3,
        decay=decay,
        weight_decay=weight_decay,
        progress=lambda done, total: seen.append((done, total)),
    )
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    optimizer = kind([given], lr=0.3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 5 if decay else 1)
    for step in range(5):
        optimizer.zero_grad()
        ((given - TARGET).square().sum() * (step + 1)).backward()
        optimizer.step()
        schedule.step()
    assert taken == 5 and torch.equal(mine, given)
    assert seen == [(n, 5) for n in range(1, 6)]


def test_it_stops_where_there_is_no_gradient_and_refuses_one_that_is_not_finite() -> None:
    w = torch.zeros(3, requires_grad=True)
    held: list[float] = []
    taken = adam(
        [w],
        lambda step: None if step == 2 else [torch.ones(3)],
        what="a vector",
        steps=9,
        learning_rate=0.1,
        after=lambda: held.append(float(w[0].detach())),
    )
    assert taken == 2 and len(held) == 2 and held[1] < held[0] < 0
    with pytest.raises(TrimtabError, match="not finite at step 0"):
        adam([w], lambda step: [torch.ones(3) * torch.nan], what="a vector", steps=1, learning_rate=1.0)  # fmt: skip
