"""Rows of a prompt search: one request each, tokenized around a slot, with the answer wanted.

    before | slot | after | target
    chat head | prefix | separator, request, assistant head | answer        (slot `prefix`)
    chat head, request | suffix | assistant head | answer                   (slot `suffix`)

Only the slot differs between candidates. That its tokens are also those of its text, in every row,
is what `round_trips` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from trimtab.errors import TrimtabError
from trimtab.models.chat import SEPARATORS, Encoded, Insert, Prompt, surroundings
from trimtab.models.model import LanguageModel

Slot: TypeAlias = "tuple[int, ...]"
EARLY = 32
EARLY_WEIGHT = 3.0


@dataclass(frozen=True)
class PromptRow:
    """One request around a slot.

    Attributes:
        before: Tokens before the slot.
        after: Tokens after it, to the end of the prompt.
        target: The wanted answer's tokens, its end token among them where it ended; none for
            objectives that read the first answer position.
        weights: One per target token.
        head: How many of `after` follow the user's text.
        request: The prompt.
        texts: The rendered text before the slot and after it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    weights: tuple[float, ...]
    head: int
    request: Prompt
    texts: tuple[str, str]

    def ids(self, slot: Sequence[int]) -> list[int]:
        """All tokens with this slot, the target's last one among them."""
        return [*self.before, *slot, *self.after, *self.target]

    def encoded(self, slot: Sequence[int]) -> Encoded:
        """What is fed to a model: nothing is predicted from the last target token."""
        prompt = len(self.before) + len(slot) + len(self.after)
        ids = self.ids(slot)
        return Encoded("", ids[: max(prompt, len(ids) - 1)], prompt, prompt - self.head)

    def first(self, count: int) -> PromptRow:
        """The same row with only the first target tokens."""
        return replace(self, target=self.target[:count], weights=self.weights[:count])


def lay_out(
    lm: LanguageModel,
    requests: Sequence[Prompt],
    slot: str = "prefix",
    separator: str | None = None,
    targets: Sequence[Sequence[int]] | None = None,
    early: int = EARLY,
    early_weight: float = EARLY_WEIGHT,
) -> list[PromptRow]:
    """Tokenize requests around a slot (`prefix`, `suffix` or `system`), with `lm.system` as it is.

    The model's chat template decides what stands around a request. The separator stands between the
    slot and the user's text: by default a space after a prefix, nothing before a suffix, whose
    own text begins with a space. `targets` are the wanted answers' tokens, one list per request; so
    many `early` ones weigh `early_weight`, the others 1.

    Raises:
        TrimtabError: A separator that shares a token with a suffix.
    """
    insert = Insert(slot, separator=SEPARATORS[slot] if separator is None else separator)
    rows = []
    wanted = [()] * len(requests) if targets is None else map(tuple, targets)
    for request, target in zip(requests, wanted, strict=True):
        around = surroundings(lm.tokenizer, request, lm.system, insert)
        weights = tuple(early_weight if t < early else 1.0 for t in range(len(target)))
        rows.append(
            PromptRow(around.before, around.after, target, weights, around.head, request, around.texts)
        )
    return rows


def slot_text(lm: LanguageModel, slot: Sequence[int]) -> str:
    """The text of a slot's tokens."""
    return str(lm.tokenizer.decode(list(slot), clean_up_tokenization_spaces=False))


def slot_ids(lm: LanguageModel, text: str, row: PromptRow) -> tuple[int, ...]:
    """The tokens of a text in its slot, as they come out in context.

    Raises:
        TrimtabError: The text shares a token with what stands around it.
    """
    ids = _whole(lm, [row.texts[0] + text + row.texts[1]])[0]
    found = _between(ids, row)
    if found is None:
        raise TrimtabError(
            f"the tokens of {text!r} in its slot",
            "a text whose first or last letters join with what stands around it",
            "end it with a full stop, or choose another separator",
        )
    return found


def round_trips(
    lm: LanguageModel, slots: Sequence[Sequence[int]], rows: Sequence[PromptRow]
) -> list[bool]:
    """Tell of which slots the text, tokenized in context, gives the same tokens in EVERY row.

    A slot whose text begins or ends with white space is refused where the chat template would trim
    it, that is where the rendered texts do not hold it.
    """
    texts = [slot_text(lm, slot) for slot in slots]
    fine = [bool(text) for text in texts]
    for row in rows:
        left = [i for i, good in enumerate(fine) if good]
        if not left:
            break
        found = _whole(lm, [row.texts[0] + texts[i] + row.texts[1] for i in left])
        for i, ids in zip(left, found, strict=True):
            fine[i] = _between(ids, row) == tuple(slots[i])
    return [
        good and (text == text.strip() or _held(lm, text))
        for text, good in zip(texts, fine, strict=True)
    ]


def _held(lm: LanguageModel, text: str) -> bool:
    """Whether the chat template keeps the white space at a text's ends."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return True
    template = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return text in str(template)


def _whole(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    found = lm.tokenizer(
        texts,
        add_special_tokens=not templated,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [list(ids) for ids in found]


def _between(ids: list[int], row: PromptRow) -> tuple[int, ...] | None:
    """What stands between a row's own tokens; None where those are not there."""
    start = len(row.before)
    for surplus in (0, 1):  # a tokenizer may close every text with an end token
        stop = len(ids) - surplus - len(row.after)
        around = tuple(ids[:start]), tuple(ids[stop : stop + len(row.after)])
        if stop >= start and around == (row.before, row.after):
            return tuple(ids[start:stop])
    return None
