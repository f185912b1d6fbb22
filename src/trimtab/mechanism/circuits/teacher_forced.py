"""The runs that a steering is explained on: fixed tokens, read once with it and once without.

Clean is the steered run and corrupt the unsteered run ON THE SAME TOKENS, prompt and response, in
one pass. At each position that predicts a response token the two runs have a greedy token each,
y_steered and y_base; the metric is

    m = sum over positions where they differ of  logit(y_steered) - logit(y_base)

and its mean over samples. Source: the multi-token patching of arXiv 2604.08524.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

RESPONSES = ("steered", "base")
TOKENS_PER_BATCH = 2048  # a backward pass keeps every layer's activations


@dataclass(frozen=True, eq=False)
class TokenRuns:
    """Prompts with fixed responses, and what each run would have said at every position.

    Attributes:
        name: such as "toward/steered": which way is steered, whose responses these are.
        vector: the steering at the strength that makes the clean run.
        encoded: prompt and response tokens; `prompt_length` is where the response begins.
        steered_next: per sample the steered run's greedy tokens `[response]`.
        base_next: the unsteered run's.
    """

    name: str
    vector: VectorSteering
    encoded: tuple[Encoded, ...]
    steered_next: tuple[Tensor, ...]
    base_next: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """How many tokens a pass over all samples reads."""
        return sum(len(item.ids) for item in self.encoded)

    def batches(
        self, lm: LanguageModel, max_tokens: int = TOKENS_PER_BATCH
    ) -> Iterator[tuple[Batch, Targets]]:
        """Yield batches with their targets."""
        for batch in lm.batches(self.encoded, max_tokens=max_tokens):
            yield batch, self.targets(batch)

    def targets(self, batch: Batch) -> Targets:
        """Return the two tokens at each position of a batch's answers."""
        order = batch.rows.tolist()
        longest = max(len(self.steered_next[i]) for i in order)
        shape = (len(order), longest)
        steered, base = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, i in enumerate(order):
            # Padded on the left as the batch is: every answer ends in the last column.
            start = longest - len(self.steered_next[i])
            steered[row, start:], base[row, start:] = self.steered_next[i], self.base_next[i]
        device = batch.input_ids.device
        return Targets(steered.to(device), base.to(device))

    def subset(self, rows: Sequence[int]) -> TokenRuns:
        """Return some of the samples."""
        return replace(
            self,
            encoded=tuple(self.encoded[i] for i in rows),
            steered_next=tuple(self.steered_next[i] for i in rows),
            base_next=tuple(self.base_next[i] for i in rows),
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """The two greedy tokens at the positions of a batch's answers, `[batch, longest]`.

    They are equal where nothing is read, and in padding.
    """

    steered: Tensor
    base: Tensor

    @property
    def keep(self) -> int:
        """How many last logits a pass has to return: the last one predicts past the answer."""
        return self.steered.shape[1] + 1

    def metric(self, logits: Tensor) -> Tensor:
        """Return m per row, `[batch]`, from logits `[batch, keep, vocab]`; differentiable."""
        values = logits[:, :-1]
        both = torch.stack([self.steered, self.base], dim=-1).to(values.device)
        pair = values.gather(-1, both).float()
        # Positions where the two agree contribute exactly nothing.
        return (pair[..., 0] - pair[..., 1]).sum(-1)


def scored_prompts(split: Behavior, sign: int) -> list[Prompt]:
    """Return the prompts whose answers a steering of this sign is to change (evaluation/evaluate.py)."""
    away = split.away if sign > 0 else split.toward
    return [example.prompt for example in (split.requests or away)]


@torch.no_grad()
def token_runs(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    responses: str = "steered",
    max_new_tokens: int = 24,
    name: str = "",
    unsteered: Callable[[Sequence[Encoded], int], list[list[int]]] | None = None,
) -> TokenRuns:
    """Fix each prompt's greedy response and read what both runs say along it.

    A steering that changes no greedy token of any response is refused.

    Args:
        lm: the unsteered model.
        vector: the steering at its strength.
        prompts: strings or conversations.
        responses: whose tokens are read, "steered" or "base".
        max_new_tokens: most tokens of a response; its end token is one of them.
        name: of the set; that of the responses when absent.
        unsteered: gives the unsteered responses of prompts; they are generated when absent.
    """
    asked = [lm.encode(prompt) for prompt in prompts]
    if responses == "steered":
        with vector.on(lm):
            answers = generation.answer_ids(lm, asked, max_new_tokens)
    else:
        answers = (unsteered or partial(generation.answer_ids, lm))(asked, max_new_tokens)
    encoded = [
        replace(item, ids=[*item.ids, *ids]) for item, ids in zip(asked, answers, strict=True)
    ]
    base = greedy_along(lm, encoded)
    with vector.on(lm):
        steered = greedy_along(lm, encoded)
    kept = [i for i in range(len(encoded)) if bool((steered[i] != base[i]).any())]
    if not kept:
        raise TrimtabError(
            asked=f"to explain {vector.label} on {len(prompts)} prompts",
            found="no greedy token of any response that it changes",
            advice="use a stronger steering (trimtab tune), or prompts that it is meant for",
        )
    whole = TokenRuns(name or responses, vector, tuple(encoded), tuple(steered), tuple(base))
    return whole.subset(kept)


@torch.no_grad()
def greedy_along(lm: LanguageModel, encoded: Sequence[Encoded]) -> list[Tensor]:
    """Return the greedy token at each position that predicts a completion's token, in order."""
    found: dict[int, Tensor] = {}
    for batch in lm.batches(encoded):
        lengths = [len(encoded[i].ids) - encoded[i].prompt_length for i in batch.rows.tolist()]
        logits = lm.forward(batch, logits_to_keep=max(lengths) + 1)[:, :-1]
        best = logits.argmax(-1).cpu()
        for row, (i, length) in enumerate(zip(batch.rows.tolist(), lengths, strict=True)):
            found[i] = best[row, best.shape[1] - length :]
    return [found[i] for i in range(len(encoded))]
