"""Greedy answers of several strengths at once, handed out while they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from trimtab.models import generation
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.fan import Fan
from trimtab.passes.greedy import greedy
from trimtab.steering.vector import VectorSteering

# Where a model takes no part in shared passes, answers are made again, each time twice as long.
FIRST_LENGTH = 4


@torch.no_grad()
def stream(
    lm: LanguageModel,
    vector: VectorSteering,
    prompt: Prompt,
    strengths: Sequence[float],
    max_new_tokens: int,
    lock: AbstractContextManager[object],
) -> Iterator[list[str]]:
    """Answer one prompt greedily at every strength, token by token.

    The lock is taken for each token by itself: hooks never outlive a token, whoever stops
    listening, and other users get their turn.

    Yields the answers so far, one per strength m, 0 the unsteered model; at the end they equal
    `lm.generate` inside `vector.at(m).on(lm)`.
    """
    with lock:
        fan = Fan(lm, vector, [lm.encode(prompt)])
        lm.check_length(len(fan.encoded[0].ids) + max_new_tokens)
        states = list(fan.states(strengths)) if fan.shares(strengths) else []
    if not states:
        # Whole generations of doubling length, until nothing more comes.
        length, before = min(FIRST_LENGTH, max_new_tokens), None
        while True:
            answers = []
            for strength in strengths:
                with lock, vector.at(strength).on(lm):
                    answers += lm.generate([prompt], max_new_tokens=length)
            yield answers
            if length == max_new_tokens or answers == before:
                return
            length, before = min(2 * length, max_new_tokens), answers
    stops = generation.end_ids(lm)
    parts = [
        (state, greedy(lm, state.batch, state.cache, stops, logits=state.logits))
        for state in states
    ]
    found: list[list[int]] = [[] for _ in strengths]
    for _ in range(max_new_tokens):
        grown = False
        for state, steps in parts:
            with lock, vector.on(lm, [strengths[i] for i in state.strengths]):
                tokens = next(steps, {})
            for row, token in tokens.items():
                found[state.strengths[row]].append(token)
            grown = grown or bool(tokens)
        if not grown:
            return
        yield [generation.decode(lm.tokenizer, ids, stops) for ids in found]
