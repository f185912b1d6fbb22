"""Trains one vector with the model frozen: batches, losses, and the one gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.batch import Batch
from trimtab.chat import Encoded
from trimtab.errors import TrimtabError
from trimtab.find.registry import Task
from trimtab.hooks import Edit, steered
from trimtab.sites import Site

REFERENCE_TOKENS = 64  # kept per position of the unsteered distribution; the rest is one lump


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep every parameter out of the graph, and restore the flags as they were."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Rows:
    """One sign's training rows: answers it should bring about, answers it should leave alone."""

    sign: int
    wanted: tuple[Encoded, ...]
    kept: tuple[Encoded, ...]


@dataclass(frozen=True, eq=False)
class _Reference:
    """The unsteered distribution along one answer: its top tokens, the rest as one lump."""

    log_p: Tensor  # [answer, top]
    tokens: Tensor  # [answer, top]


class Trainer:
    """Trains w with v = w * scale added at one layer; both are `[d_model]`."""

    def __init__(
        self, task: Task, layer: int, scale: float, sides: Sequence[Rows], keep: float
    ) -> None:
        """Read the unsteered distributions that `keep` holds on to."""
        self.task, self.scale, self.sides, self.keep = task, scale, sides, keep
        self.site = Site(task.site, layer)
        self.references = {rows.sign: self._read_references(rows.kept) for rows in sides}

    def train(
        self,
        first: Tensor,
        steps: int,
        batch_size: int,
        learning_rate: float,
        strengths: tuple[float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Return w after `steps` of Adam with linear decay, `[d_model]`."""
        w = first.clone().requires_grad_(True)
        adam = torch.optim.Adam([w], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        share = max(1, batch_size // len(self.sides))
        orders = [
            (_endless(len(r.wanted), generator), _endless(len(r.kept), generator))
            for r in self.sides
        ]
        low, high = strengths
        for step in range(steps):
            adam.zero_grad()
            w.grad = torch.zeros_like(w)
            for rows, (wanted, kept) in zip(self.sides, orders, strict=True):
                chosen = [next(wanted) for _ in range(min(share, len(rows.wanted)))]
                left = [next(kept) for _ in range(min(max(1, share // 2), len(rows.kept)))]
                n = len(chosen) + len(left)
                factors = low + (high - low) * torch.rand(n, generator=generator)
                w.grad += self._gradient(w, rows, chosen, left, factors)
            if not bool(w.grad.isfinite().all()):
                raise TrimtabError(
                    f"a vector trained at {self.site}",
                    f"a loss that is not finite at step {step}",
                    "load the model in float32 or bfloat16, or lower the learning_rate",
                )
            adam.step()
            schedule.step()
            if self.task.progress is not None:
                self.task.progress(step + 1, steps)
        return w.detach()

    @torch.no_grad()
    def loss(self, w: Tensor) -> float:
        """Return the mean loss per token of all wanted answers under w, at a = 1."""
        total, count = 0.0, 0
        for rows in self.sides:
            factors = torch.full((len(rows.wanted),), float(rows.sign))
            for batch in self.task.lm.batches(rows.wanted, max_tokens=2048):
                with self._steered(w, factors):
                    logits, targets, _ = self._answers(batch, rows.wanted)
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                total, count = total + float(loss), count + len(targets)
        return total / count

    def _gradient(
        self, w: Tensor, rows: Rows, chosen: Sequence[int], left: Sequence[int], factors: Tensor
    ) -> Tensor:
        """Return d loss / d w on some rows; large batches are taken in pieces."""
        encoded = [*(rows.wanted[i] for i in chosen), *(rows.kept[i] for i in left)]
        lengths = [len(item.ids) - item.prompt_length for item in encoded]
        n_wanted, n_kept = sum(lengths[: len(chosen)]), max(1, sum(lengths[len(chosen) :]))
        gradient = torch.zeros_like(w)
        for batch in self.task.lm.batches(encoded):
            with self._steered(w, factors * rows.sign):
                logits, targets, row = self._answers(batch, encoded)
            is_wanted = row < len(chosen)
            nll = nn.functional.cross_entropy(
                logits[is_wanted], targets[is_wanted], reduction="sum"
            )
            loss = nll / n_wanted
            known = [
                self.references[rows.sign][left[i - len(chosen)]]
                for i in batch.rows.tolist()
                if i >= len(chosen)
            ]
            if known:
                loss = loss + self.keep * _divergence(logits[~is_wanted], known) / n_kept
            gradient += torch.autograd.grad(loss, w)[0]
        return gradient / len(self.sides)

    def _steered(self, w: Tensor, factors: Tensor) -> AbstractContextManager[None]:
        """Add factor * v, with the gradient flowing to w."""
        edit = Edit(self.site, "add", w * self.scale, 1.0, scope=self.task.scope)
        return steered(self.task.lm, [edit], row_factors=factors)

    def _answers(self, batch: Batch, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 logits `[tokens, vocab]` before each answer token, the tokens and rows."""
        order = batch.rows.tolist()
        lengths = torch.tensor([len(encoded[i].ids) - encoded[i].prompt_length for i in order])
        longest = int(lengths.max())
        logits = self.task.lm.forward(batch, logits_to_keep=longest + 1)[:, :-1]
        # Rows are padded on the left, so every answer ends in the last column.
        inside = torch.arange(longest) >= (longest - lengths)[:, None]
        inside = inside.to(logits.device)
        targets = batch.input_ids[:, -longest:].to(logits.device)
        row = batch.rows.to(logits.device)[:, None].expand_as(targets)
        return logits[inside].float(), targets[inside], row[inside]

    @torch.no_grad()
    def _read_references(self, kept: Sequence[Encoded]) -> list[_Reference]:
        references: dict[int, _Reference] = {}
        for batch in self.task.lm.batches(kept, max_tokens=2048):
            logits, _, row = self._answers(batch, kept)
            log_p = logits.log_softmax(-1)
            top = log_p.topk(min(REFERENCE_TOKENS, log_p.shape[-1]), dim=-1)
            for i in batch.rows.tolist():
                mine = row == i
                references[i] = _Reference(top.values[mine], top.indices[mine])
        return [references[i] for i in range(len(kept))]


def _divergence(logits: Tensor, known: Sequence[_Reference]) -> Tensor:
    """Return the summed KL(unsteered || steered) over the top tokens and the lump of all others.

    Lumping can only lower a KL, so this bounds the true one from below; with 64 tokens, closely.
    """
    log_p = torch.cat([item.log_p for item in known])
    tokens = torch.cat([item.tokens for item in known])
    log_q = logits.log_softmax(-1).gather(1, tokens)
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    return kl.sum()


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield 0 to count - 1 in a new random order again and again."""
    while count:
        yield from torch.randperm(count, generator=generator).tolist()
