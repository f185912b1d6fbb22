"""Trains one vector with the model frozen: batches, an objective, and the one gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from trimtab.methods.recipe import Recipe
from trimtab.methods.registry import Task
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.passes.adam import adam
from trimtab.steering.hooks import Edit, steered

REFERENCE_TOKENS = 64  # kept per position of the unsteered distribution; the rest is one lump


# The loss of one sign's step, from the summed log-probability of each answer, `[answers]` (the
# chosen wanted ones, then the unwanted ones of the same requests where there are any), how many
# tokens each has, `[answers]`, and the places of the chosen ones in `Rows.wanted`.
Objective: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


def likelihood(log_p: Tensor, tokens: Tensor, chosen: Sequence[int]) -> Tensor:
    """The next-token objective: mean -log p over all tokens of the wanted answers."""
    return -log_p.sum() / tokens.sum()


@dataclass(frozen=True)
class Rows:
    """One sign's training rows: answers it should bring about, answers it should leave alone.

    Attributes:
        sign: +1 or -1, the sign that v is added with.
        wanted: answers that should become likely.
        kept: answers along which nothing should change.
        objective: what makes the wanted answers likely.
        unwanted: for an objective that compares, an answer to the request of each wanted one.
    """

    sign: int
    wanted: tuple[Encoded, ...]
    kept: tuple[Encoded, ...]
    objective: Objective = likelihood
    unwanted: tuple[Encoded, ...] = ()

    def answers(self, chosen: Sequence[int]) -> list[Encoded]:
        """Return what the objective reads: wanted answers, then their unwanted partners."""
        partners = [self.unwanted[i] for i in chosen] if self.unwanted else []
        return [*(self.wanted[i] for i in chosen), *partners]


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

    def train(self, first: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Return w after the steps of Adam with linear decay, `[d_model]`."""
        w = first.clone().requires_grad_(True)
        share = max(1, recipe.batch_size // len(self.sides))
        orders = [
            (_endless(len(r.wanted), generator), _endless(len(r.kept), generator))
            for r in self.sides
        ]
        low, high = recipe.strengths

        def gradients(step: int) -> list[Tensor]:
            total = torch.zeros_like(w)
            for rows, (wanted, kept) in zip(self.sides, orders, strict=True):
                chosen = [next(wanted) for _ in range(min(share, len(rows.wanted)))]
                left = [next(kept) for _ in range(min(max(1, share // 2), len(rows.kept)))]
                n = len(chosen) + len(left)
                factors = low + (high - low) * torch.rand(n, generator=generator)
                total += self._gradient(w, rows, chosen, left, factors)
            return [total]

        adam(
            [w],
            gradients,
            what=f"a vector trained at {self.site}",
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            progress=self.task.progress,
        )
        return w.detach()

    @torch.no_grad()
    def loss(self, w: Tensor) -> float:
        """Return the objective of all answers under w at a = 1, its mean over the signs."""
        total = 0.0
        for rows in self.sides:
            chosen = range(len(rows.wanted))
            answers = rows.answers(chosen)
            with self._steered(w, torch.full((len(answers),), float(rows.sign))):
                log_p = log_likelihoods(self.task.lm, answers)
            total += float(rows.objective(log_p, answer_tokens(answers).to(log_p.device), chosen))
        return total / len(self.sides)

    def _gradient(
        self, w: Tensor, rows: Rows, chosen: Sequence[int], left: Sequence[int], factors: Tensor
    ) -> Tensor:
        """Return d loss / d w on some rows; large batches are taken in pieces.

        `factors` holds a of each answer, `[chosen + left]`, wanted ones first; an unwanted answer
        takes its partner's.
        """
        answers = rows.answers(chosen)
        encoded = [*answers, *(rows.kept[i] for i in left)]
        n, tokens = len(answers), answer_tokens(encoded)
        partners = factors[: n - len(chosen)]
        signed = torch.cat([factors[: len(chosen)], partners, factors[len(chosen) :]]) * rows.sign
        kept_tokens = max(1, int(tokens[n:].sum()))
        pieces = list(self.task.lm.batches(encoded))
        known = torch.zeros(n)
        # Where answers are compared, none has a gradient that is known without the others.
        if rows.unwanted and len(pieces) > 1:
            with torch.no_grad(), self._steered(w, signed):
                known = log_likelihoods(self.task.lm, encoded)[:n]
        gradient = torch.zeros_like(w)
        for batch in pieces:
            with self._steered(w, signed):
                logits, targets, row = answer_logits(self.task.lm, batch, encoded)
            place = logits.device
            loss = torch.zeros((), device=place)
            own = row < n
            if bool(own.any()):
                # The other pieces' answers stand as numbers beside those that carry a gradient.
                mine = _summed(logits[own], targets[own], row[own], n)
                here = torch.zeros(n, dtype=torch.bool, device=place)
                here[row[own]] = True
                log_p = torch.where(here, mine, known.to(place))
                loss = loss + rows.objective(log_p, tokens[:n].to(place), chosen)
            references = [
                self.references[rows.sign][left[i - n]] for i in batch.rows.tolist() if i >= n
            ]
            if references:
                loss = loss + self.keep * _divergence(logits[~own], references) / kept_tokens
            gradient += torch.autograd.grad(loss, w)[0]
        return gradient / len(self.sides)

    def _steered(self, w: Tensor, factors: Tensor) -> AbstractContextManager[None]:
        """Add factor * v, with the gradient flowing to w."""
        edit = Edit(self.site, "add", w * self.scale, 1.0, scope=self.task.scope)
        return steered(self.task.lm, [edit], row_factors=factors)

    @torch.no_grad()
    def _read_references(self, kept: Sequence[Encoded]) -> list[_Reference]:
        references: dict[int, _Reference] = {}
        for batch in self.task.lm.batches(kept, max_tokens=2048):
            logits, _, row = answer_logits(self.task.lm, batch, kept)
            log_p = logits.log_softmax(-1)
            top = log_p.topk(min(REFERENCE_TOKENS, log_p.shape[-1]), dim=-1)
            for i in batch.rows.tolist():
                mine = row == i
                references[i] = _Reference(top.values[mine], top.indices[mine])
        return [references[i] for i in range(len(kept))]


def answer_logits(
    lm: LanguageModel, batch: Batch, encoded: Sequence[Encoded]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits `[tokens, vocab]` before each answer token, the tokens and their rows."""
    order = batch.rows.tolist()
    lengths = torch.tensor([len(encoded[i].ids) - encoded[i].prompt_length for i in order])
    longest = int(lengths.max())
    logits = lm.forward(batch, logits_to_keep=longest + 1)[:, :-1]
    # Rows are padded on the left, so every answer ends in the last column.
    inside = torch.arange(longest) >= (longest - lengths)[:, None]
    inside = inside.to(logits.device)
    targets = batch.input_ids[:, -longest:].to(logits.device)
    row = batch.rows.to(logits.device)[:, None].expand_as(targets)
    return logits[inside].float(), targets[inside], row[inside]


@torch.no_grad()
def log_likelihoods(lm: LanguageModel, encoded: Sequence[Encoded]) -> Tensor:
    """Return log p(answer | prompt) of each text, float32 `[n]`, under whatever steers just now."""
    total = torch.zeros(len(encoded), device=lm.device)
    for batch in lm.batches(encoded, max_tokens=2048):
        logits, targets, row = answer_logits(lm, batch, encoded)
        total += _summed(logits, targets, row, len(encoded)).to(total.device)
    return total


def answer_tokens(encoded: Sequence[Encoded]) -> Tensor:
    """Return how many tokens each answer has, float32 `[n]`."""
    return torch.tensor([float(len(item.ids) - item.prompt_length) for item in encoded])


def _summed(logits: Tensor, targets: Tensor, row: Tensor, n: int) -> Tensor:
    """Return the summed log-probability of each of n answers, zero for those that are not here."""
    log_p = -nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.zeros(n, device=log_p.device).index_add(0, row, log_p)


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
