"""Answers from Hugging Face generation, with no setting left to the model's own defaults."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.chat import Encoded, end_of_turn

if TYPE_CHECKING:
    from trimtab.model import LanguageModel


@torch.no_grad()
def answer(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    use_cache: bool,
) -> list[str]:
    """Answer each prompt; the text stops before the first token that ends an answer.

    Args:
        lm: The model.
        encoded: Prompts without completions.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 for greedy.
        seed: Of the sampling; the global random state is left untouched.
        use_cache: Whether to keep keys and values.

    Returns:
        Answers in the order of the prompts.
    """
    found = answer_ids(lm, encoded, max_new_tokens, temperature, seed, use_cache)
    stops = end_ids(lm)
    return [decode(lm.tokenizer, ids, stops) for ids in found]


@torch.no_grad()
def answer_ids(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Answer each prompt, as `answer`, in tokens; one that ended has its end token last."""
    answers: list[list[int]] = [[] for _ in encoded]
    if max_new_tokens == 0:
        return answers
    stops = end_ids(lm)
    generate = cast("Callable[..., torch.Tensor]", lm.model.generate)
    devices = sorted({p.device.index for p in lm.model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices, enabled=temperature > 0), quiet(), _own(lm.model):
        if temperature > 0:
            torch.manual_seed(seed)
        settings = _settings(lm, stops, max_new_tokens, temperature, use_cache)
        for batch in lm.batches(encoded):
            with lm.calling(batch):
                tokens = generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                )
            new = tokens[:, batch.input_ids.shape[1] :]
            for row, ids in zip(batch.rows.tolist(), new.tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
                answers[row] = ids[:end]
    return answers


def _settings(
    lm: LanguageModel,
    stops: list[int],
    max_new_tokens: int,
    temperature: float,
    use_cache: bool,
) -> GenerationConfig:
    """Every setting that shapes the text: a default of the library would count among them."""
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=temperature > 0,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=pad_id(lm.tokenizer),
        use_cache=use_cache,
        return_dict_in_generate=False,
        **(sampling if temperature > 0 else {}),
    )


@contextmanager
def _own(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's own generation settings aside: the library fills every gap from them."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


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


def end_ids(lm: LanguageModel) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's, the chat template's."""
    listed = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    ends.append(lm.tokenizer.eos_token_id)
    turn = end_of_turn(lm.tokenizer)
    if turn:
        ends.append(lm.tokenizer.convert_tokens_to_ids(turn))
    unknown = lm.tokenizer.unk_token_id
    return sorted({end for end in ends if isinstance(end, int) and end != unknown})


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the library's advice about settings that are chosen on purpose here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
