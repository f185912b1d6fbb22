"""Soft prompts: trainable vectors in a prompt's slot, the model frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.gradients import frozen
from trimtab.passes.adam import adam
from trimtab.prompts.scoring.objective import CrossEntropy, Objective
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.task.rows import Row
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.prompt import PromptSteering

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel

INITS = ("random_tokens", "reference")


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
    rows: Sequence[Row],
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
    progress: Progress | None = None,
) -> Soft:
    """Minimize the objective over k free vectors in the slot of every row, by Adam.

    Source: prompt tuning, Lester et al. 2021 (arXiv 2104.08691), and prefix tuning, Li and Liang
    2021 (arXiv 2101.00190); here the vectors enter as embeddings only.

    Args:
        lm: the model; its weights stay as they are.
        rows: what is trained on.
        k: vectors in the slot.
        generator: draws the start and the minibatches.
        init: `random_tokens`, the embeddings of random allowed tokens; `reference`, those of
            `reference`; or token ids. Ids are repeated or cut to k.
        reference: ids for `init="reference"`.
        steps: of Adam, the rate falling to 0 linearly.
        learning_rate: per coordinate, in units of the embeddings' root mean square.
        objective: cross-entropy when absent.
        batch_size: rows a step; all when absent.
        allowed: `[vocab]`, the tokens to draw from; all but special ones when absent.
        progress: called with steps done and steps in all.

    Raises:
        TrimtabError: no rows, an unusable number, or a loss that is not finite.
    """
    aim = CrossEntropy() if objective is None else objective
    start, named = starting_vectors(lm, k, init, generator, allowed, reference)
    chosen = list(rows)
    if not chosen:
        raise TrimtabError("a soft prompt", "no rows to train on", "give at least one request")
    whole = batch_size is None or batch_size >= len(chosen)
    draws = None if whole else batches(len(chosen), int(batch_size or 1), generator)

    def loss(vectors: Tensor) -> Tensor:
        picked = chosen if draws is None else [chosen[i] for i in next(draws)]
        return soft_loss(lm, picked, vectors, aim)

    def exact(vectors: Tensor) -> float:
        return float(soft_loss(lm, chosen, vectors, aim))

    every = 1 if whole else max(1, math.ceil(2 * len(chosen) / int(batch_size or 1)))
    return descend(
        lm,
        start,
        loss,
        exact,
        steps=steps,
        learning_rate=learning_rate,
        every=None if whole else every,
        init=named,
        progress=progress,
    )


def descend(
    lm: LanguageModel,
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], float],
    *,
    steps: int,
    learning_rate: float,
    init: str,
    every: int | None = None,
    hold: Callable[[Tensor], Tensor] | None = None,
    enough: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Soft:
    """Run Adam on vectors `[k, d_model]` with the rate falling to 0, and keep the best.

    Args:
        lm: the model, frozen meanwhile.
        start: float32 `[k, d_model]`.
        loss: differentiable loss of the vectors.
        exact: their loss on everything, without a gradient.
        steps: at most.
        learning_rate: per coordinate, in units of the embeddings' root mean square.
        init: name of the start.
        every: steps between measurements of `exact`; None where `loss` is exact itself.
        hold: brings the vectors back to where they may be, after each step.
        enough: asked after each loss whether to stop there.
        progress: called with steps done and steps in all.

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
    with frozen(lm.model):
        w = start.detach().to(lm.device, torch.float32).clone().requires_grad_(True)
        best, best_step, curve = w.detach().clone(), 0, list[float]()
        with torch.no_grad():
            best_loss = start_loss = _finite(exact(w.detach()), 0)

        def consider(value: float, step: int) -> None:
            nonlocal best, best_loss, best_step
            if value < best_loss:
                best, best_loss, best_step = w.detach().clone(), value, step

        def gradients(step: int) -> tuple[Tensor, ...] | None:
            value = loss(w)
            curve.append(_finite(float(value.detach()), step))
            if every is None:
                consider(curve[-1], step)
            elif step and step % every == 0:
                with torch.no_grad():
                    consider(exact(w.detach()), step)
            if enough is not None and enough():
                return None
            return torch.autograd.grad(value, w)

        taken = adam(
            [w],
            gradients,
            what="a trained soft prompt",
            steps=steps,
            learning_rate=learning_rate * embedding_scale(lm),
            after=None if hold is None else lambda: w.data.copy_(hold(w.detach())),
            progress=progress,
        )
        with torch.no_grad():
            if taken:
                consider(exact(w.detach()), taken)
    return Soft(
        vectors=best.cpu(),
        loss=best_loss,
        start_loss=start_loss,
        curve=tuple(curve),
        steps=taken,
        best_step=best_step,
        seconds=time.perf_counter() - began,
        init=init,
    )


def starting_vectors(
    lm: LanguageModel,
    k: int,
    init: str | Sequence[int],
    generator: torch.Generator,
    allowed: Tensor | None = None,
    reference: Sequence[int] = (),
) -> tuple[Tensor, str]:
    """Return float32 embeddings `[k, d_model]` to start from, and what they are called.

    Raises:
        TrimtabError: no k, an unknown start, or ids outside the vocabulary.
    """
    if isinstance(k, bool) or k < 1:
        raise TrimtabError(f"a soft prompt of {k} vectors", "no length", "give a number from 1")
    table = token_embeddings(lm)
    if init == "random_tokens":
        pool = allowed_tokens(lm, allowed).nonzero().flatten()
        drawn = torch.randint(len(pool), (k,), generator=generator)
        ids = pool[drawn].tolist()
        name = "random tokens"
    else:
        given = list(reference) if init == "reference" else init
        if isinstance(given, str) or not given or not all(0 <= i < table.shape[0] for i in given):
            raise TrimtabError(
                f"a soft prompt that starts from {init!r}",
                "no ids" if not given else f"{given!r}",
                "use random_tokens, reference with its ids in reference=, or token ids",
            )
        ids = [int(given[i % len(given)]) for i in range(k)]
        name = "reference" if init == "reference" else "given tokens"
    return table[ids].detach().float(), name


def allowed_tokens(lm: LanguageModel, allowed: Tensor | None = None) -> Tensor:
    """Return the tokens that may be used, bool `[vocab]`: those given, or all but special ones.

    Raises:
        TrimtabError: nothing is allowed, or a mask of another length.
    """
    size = token_embeddings(lm).shape[0]
    if allowed is None:
        mask = torch.arange(size) < len(lm.tokenizer)
        mask[[i for i in lm.tokenizer.all_special_ids if i < size]] = False
    else:
        mask = allowed.detach().cpu().bool()
    if mask.shape != (size,) or not bool(mask.any()):
        raise TrimtabError(
            "tokens for a prompt",
            f"a mask of shape {list(mask.shape)} with {int(mask.sum())} tokens allowed",
            f"allow at least one of the model's {size} tokens",
        )
    return mask


def embedding_scale(lm: LanguageModel) -> float:
    """Return the root mean square of the embeddings' coordinates, the unit of learning rates."""
    return max(float(token_embeddings(lm).detach().float().square().mean().sqrt()), 1e-8)


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


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise TrimtabError(
            "a trained soft prompt",
            f"a loss that is not finite at step {step}",
            "load the model in float32 or bfloat16, or lower the learning_rate",
        )
    return value
