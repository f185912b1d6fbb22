"""The teacher: what the reference prompt makes the model answer, as tokens and as distributions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from trimtab.models import generation
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.prompts.task.requests import SPLITS, Requests
from trimtab.prompts.task.rows import EARLY, EARLY_WEIGHT, PromptRow, lay_out
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Switch

COMPLETION = 24  # tokens of a reference answer
# One float32 tensor of logits holds at most this many numbers (256 MiB), whatever the vocabulary.
_LOGITS = 2**26


@dataclass(frozen=True)
class Teacher:
    """The rows of the three splits, their targets the answers under the reference prompt.

    Attributes:
        lever: the reference prompt in its slot.
        train: rows a search may look at.
        validation: rows that select.
        test: rows that score.
    """

    lever: PromptSteering
    train: tuple[PromptRow, ...] = field(repr=False)
    validation: tuple[PromptRow, ...] = field(repr=False)
    test: tuple[PromptRow, ...] = field(repr=False)


def teacher(
    lm: LanguageModel,
    reference: str,
    requests: Requests,
    slot: str = "prefix",
    separator: str | None = None,
    max_new_tokens: int = COMPLETION,
    early: int = EARLY,
    early_weight: float = EARLY_WEIGHT,
) -> Teacher:
    """Answer all requests under the reference prompt, once, and lay the answers out as rows."""
    lever = PromptSteering(reference, slot=slot, separator=separator)
    rows = partial(
        teacher_rows, lm, lever, max_new_tokens=max_new_tokens, early=early,
        early_weight=early_weight,
    )  # fmt: skip
    return Teacher(lever, *(tuple(rows(getattr(requests, split))) for split in SPLITS))


def teacher_rows(
    lm: LanguageModel,
    lever: PromptSteering,
    requests: Sequence[Prompt],
    max_new_tokens: int = COMPLETION,
    early: int = EARLY,
    early_weight: float = EARLY_WEIGHT,
) -> list[PromptRow]:
    """Return one row per request; its target is the greedy answer under the lever, in tokens."""
    targets = answers_as_ids(lm, lever, requests, max_new_tokens)
    return lay_out(lm, requests, lever.slot, lever.separator, targets, early, early_weight)


def answers_as_ids(
    lm: LanguageModel,
    lever: Switch | None,
    requests: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the token ids of the answers under a lever (none: the bare model), end tokens kept."""
    with switched(lm, lever):
        encoded = [lm.encode(request) for request in requests]
        for item in encoded:
            lm.check_length(len(item.ids) + max_new_tokens)
        return generation.answer_ids(lm, encoded, max_new_tokens, temperature, seed)


@torch.no_grad()
def target_log_probs(lm: LanguageModel, lever: Switch | None, rows: Sequence[PromptRow]) -> list[Tensor]:
    """Return what a lever predicts along the rows' targets, from the rendered text.

    The lever puts its text (or soft tokens) into each request, which is rendered and tokenized
    whole, as a user would; the target's tokens follow. Per row float32 `[target, vocab]`.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with switched(lm, lever):
        prompts = [lm.encode(row.request) for row in rows]
        # Nothing is predicted from the last target token.
        fed = [
            replace(prompt, ids=[*prompt.ids, *row.target[:-1]])
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        tokens = min(8192, max(256, _LOGITS // int(text_config(lm.model).vocab_size)))
        for batch in lm.batches(fed, max_tokens=tokens):
            places = batch.rows.tolist()
            keep = max(len(rows[i].target) for i in places)
            logits = lm.forward(batch, logits_to_keep=keep)
            for line, place in enumerate(places):
                last = logits[line, keep - len(rows[place].target) :]
                found[place] = torch.log_softmax(last.float(), dim=-1)
    return found


def switched(lm: LanguageModel, lever: Switch | None) -> AbstractContextManager[None]:
    """Switch a lever on; None is the bare model."""
    return nullcontext() if lever is None else lever.on(lm)
