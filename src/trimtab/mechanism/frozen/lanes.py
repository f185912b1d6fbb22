"""Two lanes of one batch: the same tokens unsteered and steered, continued together.

At each step the steered lane's greedy token is fed to both lanes, so the base lane says at every
position what the model does unsteered on the very text that the steered run writes. With a part of
the steered lane held at the base lane's (holding.py) this is a frozen run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.mechanism.frozen.holding import holding
from trimtab.models import generation
from trimtab.models.batch import Batch
from trimtab.models.replay import KeptCache
from trimtab.passes.fan import step
from trimtab.passes.sharing import call, spread

if TYPE_CHECKING:
    from trimtab.models.chat import Prompt
    from trimtab.models.model import LanguageModel
    from trimtab.steering.vector import VectorSteering

LANES = (0.0, 1.0)  # how much of the steering each lane gets
TOKENS_PER_BATCH = 4096  # of a lane


@torch.no_grad()
def lane_logits(
    lm: LanguageModel,
    vector: VectorSteering,
    batch: Batch,
    holds: Sequence[str] = (),
    *,
    factors: tuple[float, float] = LANES,
    null_seed: int | None = None,
    keep: int = 0,
) -> Tensor:
    """Read fixed tokens in both lanes and return the second lane's logits `[batch, kept, vocab]`.

    Args:
        lm: the unsteered model.
        vector: an additive steering at its strength.
        batch: from `lm.batches`; one lane.
        holds: what is held at the base lane's, see holding.py.
        factors: of the base and of the steered lane; (1, 1) steers both.
        null_seed: hold by a change of equal size in another direction.
        keep: only this many last positions; 0 for all.

    Raises:
        TrimtabError: as `holding`.
    """
    both = spread(batch, 2)
    with holding(lm, vector, holds, _by_row(factors, len(batch.rows)), null_seed):
        return lm.forward(both, logits_to_keep=keep).chunk(2)[1]


@torch.no_grad()
def lane_answers(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    holds: Sequence[str] = (),
    *,
    max_new_tokens: int = 40,
    factors: tuple[float, float] = LANES,
    null_seed: int | None = None,
    use_cache: bool = True,
) -> list[str]:
    """Answer prompts greedily in the second lane; without a hold, as `lm.generate` does steered.

    Args:
        lm: the unsteered model.
        vector: an additive steering at its strength.
        prompts: strings or conversations.
        holds: what is held at the base lane's, see holding.py.
        max_new_tokens: most tokens of an answer.
        factors: of the base and of the steered lane.
        null_seed: hold by a change of equal size in another direction.
        use_cache: whether to keep keys and values of both lanes.

    Raises:
        TrimtabError: no prompts, a length out of range, or as `holding`.
    """
    if not prompts or max_new_tokens < 1:
        raise TrimtabError(
            asked=f"answers of {max_new_tokens} tokens to {len(prompts)} prompts",
            found="nothing to write",
            advice="ask for at least one token in answer to at least one prompt",
        )
    encoded = [lm.encode(prompt) for prompt in prompts]
    for item in encoded:
        lm.check_length(len(item.ids) + max_new_tokens)
    stops = generation.end_ids(lm)
    answers = [""] * len(encoded)
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        both = spread(batch, 2)
        with holding(lm, vector, holds, _by_row(factors, len(batch.rows)), null_seed):
            found = (_cached if use_cache else _whole)(lm, both, max_new_tokens, stops)
        for place, ids in zip(batch.rows.tolist(), found, strict=True):
            answers[place] = generation.decode(lm.tokenizer, ids, stops)
    return answers


def _by_row(factors: tuple[float, float], rows: int) -> Tensor:
    return torch.tensor(factors, dtype=torch.float32).repeat_interleave(rows)


def _cached(
    lm: LanguageModel, batch: Batch, max_new_tokens: int, stops: Sequence[int]
) -> list[list[int]]:
    """The second lane's tokens; a pair of rows that has ended leaves the batch."""
    found: list[list[int]] = [[] for _ in range(len(batch.rows) // 2)]
    cache, mask = KeptCache(), batch.attention_mask
    logits = call(lm, batch, batch.input_ids, mask, cache, 1)
    assert logits is not None  # this cache ends no pass
    logits = logits[:, -1]
    ends = torch.tensor(stops, dtype=torch.long, device=mask.device)
    for count in range(max_new_tokens):
        tokens = logits.chunk(2)[1].argmax(-1).to(mask.device)
        for row, token in zip(batch.rows.tolist(), tokens.tolist(), strict=False):
            found[row].append(token)
        going = ~torch.isin(tokens, ends)
        if not bool(going.any()) or count + 1 == max_new_tokens:
            break
        if not bool(going.all()):
            pairs = going.repeat(2).nonzero()[:, 0]
            batch, mask, tokens = batch.take(pairs), mask[pairs], tokens[going]
            cache.batch_select_indices(pairs)
        logits, mask = step(lm, batch, tokens.repeat(2), mask, cache)
    return found


def _whole(
    lm: LanguageModel, batch: Batch, max_new_tokens: int, stops: Sequence[int]
) -> list[list[int]]:
    """The same, every text read from its beginning at every step."""
    n = len(batch.rows) // 2
    found: list[list[int]] = [[] for _ in range(n)]
    for _ in range(max_new_tokens):
        tokens = lm.forward(batch, logits_to_keep=1)[n:, -1].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if not found[row] or found[row][-1] not in stops:
                found[row].append(token)
        if all(ids[-1] in stops for ids in found):
            break
        column = tokens.to(batch.input_ids.device).repeat(2)[:, None]
        batch = replace(
            batch,
            input_ids=torch.cat([batch.input_ids, column], dim=1),
            attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 1), value=1),
        )
    return found
