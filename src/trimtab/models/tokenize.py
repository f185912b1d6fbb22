"""Text becomes tokens, with a way from a character to the number of tokens before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_around(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    soft: dict[str, tuple[int, ...]],
    add_special_tokens: bool,
) -> tuple[list[int], Callable[[int, bool], int]]:
    """As `tokenize`, with ids in the place of each marker of `soft`."""
    if not soft:
        return tokenize(tokenizer, text, add_special_tokens)
    parts: list[tuple[int, int, list[int], Callable[[int, bool], int]]] = []
    start = 0
    for marker in sorted(soft, key=text.index):
        at = text.index(marker)
        if at > start or not parts:
            # The first text carries the tokens that open every text, even where it is empty.
            special = add_special_tokens and not parts
            parts.append((start, at, *tokenize(tokenizer, text[start:at], special)))
        start = at + len(marker)
        # Nothing looks inside a marker: what lies in it counts as not yet reached.
        parts.append((at, start, list(soft[marker]), lambda *_: 0))
    if start < len(text):
        parts.append((start, len(text), *tokenize(tokenizer, text[start:], False)))

    def count(char: int, straddling: bool) -> int:
        total = 0
        for begin, end, ids, inside in parts:
            if char >= end:
                total += len(ids)
            elif char > begin:
                total += inside(char - begin, straddling)
        return total

    return [token for part in parts for token in part[2]], count


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool
) -> tuple[list[int], Callable[[int, bool], int]]:
    """Tokens of a text, and a function from a character to the number of tokens before it.

    Of a token that lies across the character, `count(char, True)` says that it comes before and
    `count(char, False)` that it does not.
    """

    def encode(part: str, offsets: bool) -> dict[str, list]:
        return dict(
            tokenizer(
                part,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=offsets,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        )

    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = encode(text, fast)
    ids: list[int] = list(encoding["input_ids"])
    eos, eos_text = tokenizer.eos_token_id, tokenizer.eos_token
    if fast:
        spans: list[tuple[int, int]] = list(encoding["offset_mapping"])
        # A tokenizer that closes every text with eos would end the prompt before the answer: such a
        # token covers no characters.
        while len(ids) > 1 and ids[-1] == eos and tuple(spans[-1]) == (0, 0):
            ids.pop()
            spans.pop()

        def count(char: int, straddling: bool) -> int:
            n = len(ids)
            while n > 0 and spans[n - 1] != (0, 0):
                start, end = spans[n - 1]
                if (start < char) if straddling else (end <= char):
                    break
                n -= 1
            return n

        return ids, count
    while len(ids) > 1 and ids[-1] == eos and not text.endswith(str(eos_text)):
        ids.pop()

    def count_prefix(char: int, straddling: bool) -> int:
        if char >= len(text):
            return len(ids)
        prefix = list(encode(text[:char], False)["input_ids"])
        while len(prefix) > 1 and prefix[-1] == eos and not text[:char].endswith(str(eos_text)):
            prefix.pop()
        common = 0
        while common < min(len(prefix), len(ids)) and prefix[common] == ids[common]:
            common += 1
        return min(len(prefix), len(ids)) if straddling else common

    return ids, count_prefix
