"""Greedy answers at many strengths of one vector at once, the same texts as `lm.generate` writes.

Prompts are read through `Fan`; then every prompt at every strength is a row of one batch, and rows
that have ended leave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.batch import Batch
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.replay import KeptCache, KeptLayer
from trimtab.passes.fan import Fan, State
from trimtab.passes.greedy import collect, greedy
from trimtab.steering.vector import VectorSteering

# Keys and values of the rows that are continued together take at most this many bytes (1 GiB).
CACHE_BYTES = 2**30


@torch.no_grad()
def rollout(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    strengths: Sequence[float],
    *,
    max_new_tokens: int = 40,
) -> list[list[str]]:
    """Answer prompts greedily at every strength.

    Args:
        lm: The model.
        vector: What is scaled; its own strength does not matter.
        prompts: Strings or conversations.
        strengths: Multipliers m of any sign.
        max_new_tokens: Most tokens of an answer.

    Returns:
        Per strength one answer per prompt; equal to `lm.generate` inside `vector.at(m).on(lm)`.

    Raises:
        TrimtabError: No prompts or strengths, a number out of range, or a vector of another model.
    """
    if isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise TrimtabError(
            f"max_new_tokens={max_new_tokens!r}", "no count of tokens", "give a number from 0"
        )
    fan = Fan(lm, vector, [lm.encode(prompt) for prompt in prompts])
    for item in fan.encoded:
        lm.check_length(len(item.ids) + max_new_tokens)
    answers = [[""] * len(prompts) for _ in strengths]
    if not fan.shares(strengths):
        for place, strength in enumerate(strengths):
            with vector.at(strength).on(lm):
                answers[place] = lm.generate(list(prompts), max_new_tokens=max_new_tokens)
    elif max_new_tokens:
        stops = generation.end_ids(lm)
        for state in _packed(fan.states(strengths), max_new_tokens):
            with vector.on(lm, [strengths[i] for i in state.strengths]):
                steps = greedy(lm, state.batch, state.cache, stops, logits=state.logits)
                rows = collect(steps, len(state.prompts), max_new_tokens)
            for place, row, ids in zip(state.strengths, state.prompts, rows, strict=True):
                answers[place][row] = generation.decode(lm.tokenizer, ids, stops)
    return answers


def _packed(states: Iterator[State], max_new_tokens: int) -> Iterator[State]:
    """States joined as far as memory allows: a step costs little more for many rows than for few."""
    pack: list[State] = []
    for state in states:
        if pack and _bytes([*pack, state], max_new_tokens) > CACHE_BYTES:
            yield _join(pack, max_new_tokens)
            pack = []
        pack.append(state)
    if pack:
        yield _join(pack, max_new_tokens)


def _bytes(pack: Sequence[State], max_new_tokens: int) -> int:
    """What the keys and values of all rows come to at the end."""
    layers = [pack[0].cache.pair(i) for i in range(len(pack[0].cache.layers))]
    token = sum(x[0, :, 0].numel() * x.element_size() for pair in layers for x in pair)
    width = max(state.batch.input_ids.shape[1] for state in pack)
    return sum(len(state.prompts) for state in pack) * token * (width + max_new_tokens)


def _join(pack: Sequence[State], max_new_tokens: int) -> State:
    """One state of all rows, padded on the left to a common width."""
    width = max(state.batch.input_ids.shape[1] for state in pack)
    gaps = [width - state.batch.input_ids.shape[1] for state in pack]

    def widened(name: str) -> Tensor:
        parts = [getattr(state.batch, name) for state in pack]
        return torch.cat(
            [torch.nn.functional.pad(x, (gap, 0)) for x, gap in zip(parts, gaps, strict=True)]
        )

    layers: list[KeptLayer] = []
    for i in range(len(pack[0].cache.layers)):
        # Zeros: what is masked still must be a number.
        pairs = [
            [torch.nn.functional.pad(x, (0, 0, gap, 0)) for x in state.cache.pair(i)]
            for state, gap in zip(pack, gaps, strict=True)
        ]
        keys, values = (torch.cat(list(side)) for side in zip(*pairs, strict=True))
        layers.append(KeptLayer.of(keys, values, width + max_new_tokens))
    rows = sum(len(state.prompts) for state in pack)
    device = pack[0].batch.rows.device
    batch = Batch(
        input_ids=widened("input_ids"),
        attention_mask=widened("attention_mask"),
        prompt_length=torch.cat([state.batch.prompt_length for state in pack]),
        instruction_end=torch.cat([state.batch.instruction_end for state in pack]),
        rows=torch.arange(rows, device=device),
    )
    return State(
        tuple(i for state in pack for i in state.strengths),
        tuple(i for state in pack for i in state.prompts),
        batch,
        KeptCache(layers),
        torch.cat([state.logits for state in pack]),
    )
