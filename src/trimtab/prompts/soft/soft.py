"""Soft prompts: trainable vectors in a prompt's slot, the model frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.gradients import frozen
from trimtab.models.model import LanguageModel
from trimtab.passes.adam import adam
from trimtab.prompts.scoring.objective import CrossEntropy, Objective
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.task.rows import PromptRow
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.prompt import PromptSteering


@dataclass(frozen=True, eq=False)
class Soft(Printable):
    """Vectors for a slot, and how they were trained.

    Attributes:
        vectors: float32 `[k, d_model]` on the CPU, in the units of `inputs_embeds`; the best seen.
        loss: of these vectors on all rows given.
        start_loss: of the vectors it started from, on all rows.
        curve: loss of each step; on that step's rows where minibatches were drawn.
        steps: taken.
        best_step: the step whose vectors these are.
        seconds: it took.
        init: what it started from.
    """

    vectors: Tensor = field(repr=False)
    loss: float
    start_loss: float
    curve: tuple[float, ...] = field(repr=False)
    steps: int
    best_step: int
    seconds: float
    init: str

    def lever(
        self, lm: LanguageModel, slot: str = "prefix", separator: str | None = None
    ) -> PromptSteering:
        """Return the steering that puts the vectors into a slot of every prompt of `lm`.

        Slot and separator are those that the rows were laid out with.
        """
        return PromptSteering(
            "",
            slot=slot,
            separator=separator,
            vectors=self.vectors,
            provenance={
                "method": "soft",
                "init": self.init,
                "steps": self.steps,
                "loss": self.loss,
                "start_loss": self.start_loss,
            },
            fingerprint=lm.fingerprint,
            model_name=lm.name or "",
        )

    def table(self) -> Table:
        """Return one line per fact."""
        rows = (
            ("tokens", str(self.vectors.shape[0])),
            ("start", f"{self.init}, loss {number(self.start_loss, 3)}"),
            ("loss", number(self.loss, 3)),
            ("steps", f"{self.steps}, best {self.best_step}"),
            ("seconds", number(self.seconds, 1)),
        )
        return Table("Soft prompt", ("", ""), rows)


def train_soft(
    lm: LanguageModel,
    rows: Sequence[PromptRow],
    k: int,
    *,
    generator: torch.Generator,
    init: str | Sequence[int] = "random_tokens",
    reference: Sequence[int] = (),
    steps: int = 40,
    learning_rate: float = 0.3,
    objective: Objective | None = None,
    batch_size: int | None = None,
    allowed: Tensor | None = None,
) -> Soft:
    """Minimize the objective over k free vectors in the slot of every row, by Adam.

    Source: prompt tuning, Lester et al. 2021 (arXiv 2104.08691), and prefix tuning, Li and Liang
    2021 (arXiv 2101.00190); here the vectors enter as embeddings only.

    Args:
        lm: the model; its weights stay as they are.
        rows: what is trained on.
        k: vectors in the slot.
        generator: draws the start and the minibatches.
        init: see `start_from`, also for `reference` and `allowed`.
        reference: ids for `init="reference"`.
        steps: of Adam, the rate falling to 0 linearly.
        learning_rate: per coordinate, in units of the embeddings' root mean square.
        objective: cross-entropy when absent.
        batch_size: rows a step; all when absent.
        allowed: `[vocab]`, the tokens to draw from.
    """
    aim = objective or CrossEntropy()
    start = start_from(lm, k, generator, init, reference, allowed)
    draw = drawing(rows, batch_size, generator)
    # Minibatches are compared on all rows every second time that each row was seen.
    whole = batch_size is None or batch_size >= len(rows)
    return descend(
        lm,
        start,
        lambda vectors: soft_loss(lm, draw(), vectors, aim),
        steps=steps,
        learning_rate=learning_rate,
        exact=None if whole else lambda vectors: soft_loss(lm, rows, vectors, aim),
        every=1 if batch_size is None else math.ceil(2 * len(rows) / batch_size),
    )


class Start(NamedTuple):
    """What a training starts from: float32 vectors `[k, d_model]` and what they are called."""

    vectors: Tensor
    name: str


def start_from(
    lm: LanguageModel,
    k: int,
    generator: torch.Generator,
    init: str | Sequence[int] = "random_tokens",
    reference: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> Start:
    """Return embeddings to start from, on the model's device.

    `init` is `random_tokens`, those of tokens drawn from the `allowed` ones; `reference`, those of
    the reference's ids; or ids. Ids are repeated or cut to k.
    """
    if k < 1:
        raise TrimtabError(f"a soft prompt of {k} vectors", "no length", "give a number from 1")
    table = token_embeddings(lm)
    if init == "random_tokens":
        pool = allowed_tokens(lm, allowed).nonzero().flatten()
        ids = pool[torch.randint(len(pool), (k,), generator=generator)].tolist()
        return Start(table[ids].detach().float(), "random tokens")
    given = reference if init == "reference" else init
    ids = [int(given[i % len(given)]) for i in range(k)]
    name = "reference" if init == "reference" else "given tokens"
    return Start(table[ids].detach().float(), name)


def descend(
    lm: LanguageModel,
    start: Start,
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
    exact: Callable[[Tensor], Tensor] | None = None,
    every: int = 1,
    hold: Callable[[Tensor], Tensor] | None = None,
    enough: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Soft:
    """Run Adam on vectors `[k, d_model]` with the rate falling to 0, and keep the best.

    The model is frozen meanwhile. Where `loss` is of a part, `exact` is that of everything, measured
    every so many steps. `hold` brings the vectors back to where they may be, after each step;
    `enough` is asked after each loss whether to stop there.

    Raises:
        TrimtabError: an unusable number, or a loss that is not finite.
    """
    if steps < 0 or not (math.isfinite(learning_rate) and learning_rate > 0):
        raise TrimtabError(
            "trained vectors",
            f"steps={steps}, learning_rate={learning_rate}",
            "use a count of steps from 0 and a positive rate",
        )
    began = time.perf_counter()
    w = start.vectors.detach().to(lm.device, torch.float32).clone().requires_grad_(True)
    best, best_step, best_loss = w.detach().clone(), 0, math.inf
    curve: list[float] = []

    def consider(value: float, step: int) -> float:
        nonlocal best, best_loss, best_step
        if value < best_loss:
            best, best_loss, best_step = w.detach().clone(), value, step
        return value

    @torch.no_grad()
    def measure(step: int) -> float:
        return consider(float((exact or loss)(w.detach())), step)

    def gradients(step: int) -> tuple[Tensor, ...] | None:
        value = loss(w)
        curve.append(float(value.detach()))
        if exact is None:
            consider(curve[-1], step)
        elif step and step % every == 0:
            measure(step)
        if enough is not None and enough():
            return None
        return torch.autograd.grad(value, w)

    with frozen(lm.model):
        start_loss = measure(0)
        taken = adam(
            [w],
            gradients,
            what="a trained soft prompt",
            steps=steps,
            learning_rate=learning_rate * embedding_scale(lm),
            after=None if hold is None else lambda: w.data.copy_(hold(w.detach())),
            progress=progress,
        )
        if taken:
            measure(taken)
    return Soft(
        vectors=best.cpu(),
        loss=best_loss,
        start_loss=start_loss,
        curve=tuple(curve),
        steps=taken,
        best_step=best_step,
        seconds=time.perf_counter() - began,
        init=start.name,
    )


def allowed_tokens(lm: LanguageModel, allowed: Tensor | None = None) -> Tensor:
    """Return the tokens that may be used, bool `[vocab]`: those given, or all but special ones."""
    if allowed is not None:
        return allowed.detach().cpu().bool()
    size = token_embeddings(lm).shape[0]
    mask = torch.arange(size) < len(lm.tokenizer)
    mask[[i for i in lm.tokenizer.all_special_ids if i < size]] = False
    return mask


def embedding_scale(lm: LanguageModel) -> float:
    """Return the root mean square of the embeddings' coordinates, the unit of learning rates."""
    return max(float(token_embeddings(lm).detach().float().square().mean().sqrt()), 1e-8)


def drawing(
    rows: Sequence[PromptRow], size: int | None, generator: torch.Generator
) -> Callable[[], Sequence[PromptRow]]:
    """Return a function that gives the rows of the next step: `size` of them, all when None."""
    if size is None or size >= len(rows):
        return lambda: rows
    order = batches(len(rows), size, generator)
    return lambda: [rows[i] for i in next(order)]


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield `size` of 0 to count - 1 again and again, each once before any comes twice."""
    if size < 1:
        raise TrimtabError(f"batches of {size} rows", "no size", "give a number from 1")
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
