"""Answers from Hugging Face generation, with no setting left to the model's own defaults."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded, end_of_turn


class Generating(Protocol):
    """What is needed of a language model (`trimtab.models.model`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def batches(self, encoded: Sequence[Encoded], /) -> Iterator[Batch]: ...
    def calling(self, batch: Batch, /) -> AbstractContextManager[None]: ...


@torch.no_grad()
def answer_ids(
    lm: Generating,
    encoded: Sequence[Encoded],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Answer each prompt, as `LanguageModel.generate`, in tokens; one that ended has its end last."""
    answers: list[list[int]] = [[] for _ in encoded]
    if max_new_tokens == 0:
        return answers
    stops = end_ids(lm)
    generate = cast("Callable[..., torch.Tensor]", lm.model.generate)
    settings = _Complete(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=pad_id(lm.tokenizer),
        use_cache=use_cache,
        return_dict_in_generate=False,
    )
    sampling = [_Sampling(temperature, seed)] if temperature > 0 else []
    with quiet():
        for batch in lm.batches(encoded):
            with lm.calling(batch):
                tokens = generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                    logits_processor=LogitsProcessorList(sampling),
                )
            new = tokens[:, batch.input_ids.shape[1] :]
            for row, ids in zip(batch.rows.tolist(), new.tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
                answers[row] = ids[:end]
    return answers


class _Complete(GenerationConfig):
    """Settings whose gaps are filled with the library's defaults, never with the model's own."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """As the library does, but for the model's settings: the ones that may bring new entries."""
        if allow_custom_entries:
            return {}
        return super().update(defaults_only, allow_custom_entries, **settings)


class _Sampling(LogitsProcessor):
    """Draws each row's token from the softmax at a temperature, and leaves no other possible.

    The library would draw it with the process's global generator, which all threads share.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.seed = temperature, seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        shares = (scores / self.temperature).softmax(-1)
        tokens = torch.multinomial(shares, 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> str:
    """The text before the first token that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; padding is masked, so any will do where the tokenizer has none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def end_ids(lm: Generating) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's, the chat template's."""
    listed = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    ends.append(lm.tokenizer.eos_token_id)
    turn = end_of_turn(lm.tokenizer)
    if turn:
        ends.append(lm.tokenizer.convert_tokens_to_ids(turn))
    unknown = lm.tokenizer.unk_token_id
    return sorted({end for end in ends if isinstance(end, int) and end != unknown})


_quiet_lock = threading.Lock()
_quiet_blocks = 0
_loud_level = logging.NOTSET


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the library's advice about settings that are chosen on purpose here.

    Blocks of several threads may overlap: the first one in and the last one out change the logger.
    """
    global _quiet_blocks, _loud_level
    logger = logging.getLogger("transformers")
    with _quiet_lock:
        if not _quiet_blocks:
            _loud_level = logger.level
            logger.setLevel(logging.ERROR)
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_blocks -= 1
            if not _quiet_blocks:
                logger.setLevel(_loud_level)
