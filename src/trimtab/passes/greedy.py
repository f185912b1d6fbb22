"""Greedy decoding, step by step: the one loop behind every answer that `lm.generate` does not write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from trimtab.models.batch import Batch
from trimtab.models.model import LanguageModel
from trimtab.passes.sharing import call

# Rows that have ended are dropped when they are at least this share: dropping copies the others.
ENDED_SHARE = 1 / 8


@torch.no_grad()
def greedy(
    lm: LanguageModel,
    batch: Batch,
    cache: DynamicCache | None,
    stops: Sequence[int] = (),
    *,
    logits: Tensor | None = None,
    lanes: int = 1,
) -> Iterator[dict[int, int]]:
    """Yield row -> its next token, until every row has ended; a step is computed when asked for.

    Args:
        lm: The model, steered by the caller, also between steps.
        batch: The prompts; rows are named by `batch.rows`.
        cache: Grows by the tokens; None to read every text again from its beginning.
        stops: Tokens that end a row. Rows that have ended leave the batch, though not at once.
        logits: Of the first token `[rows, vocab]`, where the cache holds the prompts already.
        lanes: The batch is so many equal parts; the last one's tokens are fed to all of them, and
            named by the rows of the first.
    """
    mask = batch.attention_mask
    # Where the ids go, which in a sharded model is not where the logits come out.
    ends = torch.tensor(list(stops), dtype=torch.long, device=mask.device)
    ended = torch.zeros(len(batch.rows) // lanes, dtype=torch.bool, device=mask.device)
    if logits is None:
        logits = _next(lm, batch, batch.input_ids, mask, cache)
    while True:
        tokens = logits.chunk(lanes)[-1].argmax(-1).to(mask.device)
        yield dict(zip(batch.rows.tolist(), tokens.tolist(), strict=False))
        ended |= torch.isin(tokens, ends)
        share = float(ended.float().mean())
        if share == 1:
            return
        if share >= ENDED_SHARE:
            rows = (~ended).repeat(lanes).nonzero()[:, 0]
            batch, mask, tokens, ended = batch.take(rows), mask[rows], tokens[~ended], ended[~ended]
            if cache is not None:
                cache.batch_select_indices(rows)
        column, mask = tokens.repeat(lanes)[:, None], pad(mask, (0, 1), value=1)
        if cache is None:
            ids = torch.cat([batch.input_ids, column], dim=1)
            batch = replace(batch, input_ids=ids, attention_mask=mask)
        logits = _next(lm, batch, column, mask, cache)


def collect(steps: Iterator[dict[int, int]], rows: int, max_new_tokens: int) -> list[list[int]]:
    """Return each row's tokens, the one that ends an answer and some after it included."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for tokens in islice(steps, max_new_tokens):
        for row, token in tokens.items():
            found[row].append(token)
    return found


def _next(
    lm: LanguageModel, batch: Batch, ids: Tensor, mask: Tensor, cache: DynamicCache | None
) -> Tensor:
    """Return logits `[rows, vocab]` after the ids, which follow what the cache holds."""
    if cache is None:
        return lm.forward(batch, logits_to_keep=1)[:, -1]
    logits = call(lm, batch, ids, mask, cache, 1)
    assert logits is not None  # only a cache that is told to stop gives none
    return logits[:, -1]
