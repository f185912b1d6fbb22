"""Greedy answers of several strengths at once, handed out while they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from trimtab.models import generation
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.fan import Fan, State, step
from trimtab.steering.vector import VectorSteering

# Where a model takes no part in shared passes, answers are made anew, each time twice as long.
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

    Args:
        lm: the model.
        vector: what is scaled; its own strength does not matter.
        prompt: a string or a conversation.
        strengths: multipliers m; 0 is the unsteered model.
        max_new_tokens: most tokens of an answer.
        lock: held while the model is steered.

    Yields:
        The answers so far, one per strength; at the end they equal `lm.generate` inside
        `vector.at(m).on(lm)`.

    Raises:
        TrimtabError: a prompt that is too long, a vector of another model, a number out of range.
    """
    with lock:
        fan = Fan(lm, vector, [lm.encode(prompt)])
        lm.check_length(len(fan.encoded[0].ids) + max_new_tokens)
        states = list(fan.states(strengths)) if fan.shares(strengths) else []
    if not states:
        yield from _again(lm, vector, prompt, strengths, max_new_tokens, lock)
        return
    stops = generation.end_ids(lm)
    rows = [_Rows(state, [strengths[i] for i in state.strengths]) for state in states]
    answers = [""] * len(strengths)
    for _ in range(max_new_tokens):
        for part in rows:
            with lock:
                part.advance(lm, vector, stops)
            for place, ids in zip(part.state.strengths, part.found, strict=True):
                answers[place] = generation.decode(lm.tokenizer, ids, stops)
        yield list(answers)
        if all(part.ended for part in rows):
            return


class _Rows:
    """The rows of one state, and the tokens that they have grown by."""

    def __init__(self, state: State, strengths: list[float]) -> None:
        self.state, self.strengths = state, strengths
        self.mask, self.logits = state.batch.attention_mask, state.logits
        self.found: list[list[int]] = [[] for _ in strengths]
        self.tokens: torch.Tensor | None = None
        self.ended = False

    def advance(self, lm: LanguageModel, vector: VectorSteering, stops: Sequence[int]) -> None:
        """Append one token to every row; what follows a row's end is not decoded."""
        if self.ended:
            return
        if self.tokens is not None:
            with vector.on(lm, self.strengths):
                self.logits, self.mask = step(
                    lm, self.state.batch, self.tokens, self.mask, self.state.cache
                )
        self.tokens = self.logits.argmax(-1).to(self.mask.device)
        for ids, token in zip(self.found, self.tokens.tolist(), strict=True):
            ids.append(token)
        self.ended = all(any(token in stops for token in ids) for ids in self.found)


def _again(
    lm: LanguageModel,
    vector: VectorSteering,
    prompt: Prompt,
    strengths: Sequence[float],
    max_new_tokens: int,
    lock: AbstractContextManager[object],
) -> Iterator[list[str]]:
    """Answers by whole generations of doubling length, until nothing more comes."""
    length, before = min(FIRST_LENGTH, max_new_tokens), None
    while True:
        answers = []
        for strength in strengths:
            with lock, vector.at(strength).on(lm):
                (answer,) = lm.generate([prompt], max_new_tokens=length)
            answers.append(answer)
        yield answers
        if length == max_new_tokens or answers == before:
            return
        length, before = min(2 * length, max_new_tokens), answers
