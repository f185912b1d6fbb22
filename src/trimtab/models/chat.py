"""Prompts become text and tokens here, once, with the boundaries that scopes and readers need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from jinja2.exceptions import TemplateError

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.tokenize import tokenize, tokenize_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = "dict[str, str]"
Prompt: TypeAlias = "str | Sequence[Message]"

SLOTS = ("system", "prefix", "suffix")
# Between a slot and the user's text. A suffix itself begins with its space: tokenizers join the two.
SEPARATORS = {"system": "", "prefix": " ", "suffix": ""}

# Stands in for a message while the template is asked what it writes around one.
_MARKER = "trimtab0marker0text"
# Stands in for what is inserted.
_SLOT = "trimtab0slot{}0text"


@dataclass(frozen=True)
class Insert:
    """Something that every prompt gets: text, or ids that stand for no text.

    Attributes:
        slot: `prefix`, before the last user text; `suffix`, after it; `system`, in the system
            message.
        text: What is put there.
        ids: Tokens that are put there in its stead, such as those of a soft prompt.
        separator: Text between it and the user's.

    Raises:
        TrimtabError: An unknown slot.
    """

    slot: str
    text: str = ""
    ids: tuple[int, ...] = ()
    separator: str = " "

    def __post_init__(self) -> None:
        choice("slot", self.slot, SLOTS)


@dataclass(frozen=True)
class Encoded:
    """A rendered and tokenized prompt, with or without a completion.

    Attributes:
        text: The rendered text.
        ids: Its tokens.
        prompt_length: Tokens before the answer's first.
        instruction_end: Position of the first token after the last user text; equal to
            `prompt_length` where there is no chat template.
        completion_end: Position of the first token after the completion's own text (its end-of-turn
            token); None without a completion.
    """

    text: str
    ids: list[int]
    prompt_length: int
    instruction_end: int
    completion_end: int | None = None


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    system: str | None = None,
    completion: str | None = None,
    inserts: Sequence[Insert] = (),
) -> Encoded:
    """Render a prompt through the chat template where there is one, and tokenize it once.

    Args:
        tokenizer: A Hugging Face tokenizer; without a chat template a prompt is plain text.
        prompt: One user turn, or a conversation that ends where the assistant is to answer.
        system: Put in a system message where the template takes one, else before the first
            user text.
        completion: An answer, appended after the generation prompt and closed by the end-of-turn
            token.
        inserts: Put into their slots, the first one innermost. Text beside ids is tokenized by
            itself.

    Raises:
        TrimtabError: The prompt has no known form, the template refuses it, or it has no tokens.
    """
    messages = _messages(prompt)
    soft: dict[str, tuple[int, ...]] = {}
    for number, insert in enumerate(inserts):
        text = insert.text
        if insert.ids:
            text = _SLOT.format(number)
            soft[text] = insert.ids
        messages, system = _insert(messages, system, insert, text)
    templated = _templated(tokenizer)
    text, user_end = _whole(tokenizer, messages, system)
    prompt_end = len(text)
    if completion is not None:
        text += completion + end_of_turn(tokenizer)
    ids, count_until = tokenize_around(tokenizer, text, soft, add_special_tokens=not templated)
    prompt_length = count_until(prompt_end, False) if completion is not None else len(ids)
    if prompt_length == 0:
        raise TrimtabError(f"prompt {prompt!r}", "no tokens", "give a prompt with some text")
    instruction_end = (
        min(count_until(user_end, True), prompt_length) if templated else prompt_length
    )
    completion_end = None if completion is None else count_until(prompt_end + len(completion), True)
    for marker in soft:
        text = text.replace(marker, "")
    return Encoded(text, ids, prompt_length, instruction_end, completion_end)


@dataclass(frozen=True)
class Surroundings:
    """What stands around a slot of one rendered prompt.

    Attributes:
        before: Tokens before the slot.
        after: Tokens after it, the generation prompt included.
        head: How many of `after` follow the user's text.
        texts: The rendered text before the slot and after it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    head: int
    texts: tuple[str, str]


def surroundings(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system: str | None, insert: Insert
) -> Surroundings:
    """Tokenize a prompt, given as for `render`, around a slot whose content is yet to be chosen.

    Raises:
        TrimtabError: As `render`; or the separator shares a token with what follows it.
    """
    marker = _SLOT.format(0)
    messages, system = _insert(_messages(prompt), system, insert, marker)
    templated = _templated(tokenizer)
    text, user_end = _whole(tokenizer, messages, system)
    start = text.index(marker)
    end = start + len(marker)
    ids, count = tokenize(tokenizer, text, add_special_tokens=not templated)
    first, last = count(start, False), count(end, True)
    if insert.slot == "suffix" and _joins(tokenizer, text[:start]):
        raise TrimtabError(
            f"a suffix after the separator {insert.separator!r}",
            "a tokenizer that joins the two into one token",
            "use the separator '' and let the suffix begin with it",
        )
    follows = len(ids) - count(user_end, True) if templated else 0
    head = min(follows, len(ids) - last)
    return Surroundings(tuple(ids[:first]), tuple(ids[last:]), head, (text[:start], text[end:]))


def _whole(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], system: str | None
) -> tuple[str, int]:
    """The text of a conversation, and where the last user text ends in it."""
    parts = [] if system is None else [system]
    if messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    if _templated(tokenizer):
        if parts:
            messages = _place_system(tokenizer, messages, "\n\n".join(parts))
        text = _apply(tokenizer, messages)
        return text, _user_end(tokenizer, messages, text)
    if [message["role"] for message in messages] != ["user"]:
        raise TrimtabError(
            f"a conversation of {len(messages)} turns",
            "a tokenizer without a chat template",
            "give one user turn as a string, or set tokenizer.chat_template",
        )
    text = "\n\n".join([*parts, messages[0]["content"]])
    return text, len(text)


def _templated(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _joins(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether words that follow a text share its last token."""
    for word in ("the", "a", "Be", "cats"):
        _, count = tokenize(tokenizer, text + word, False)
        if count(len(text), True) > count(len(text), False):
            return True
    return False


def _insert(
    messages: list[Message], system: str | None, insert: Insert, text: str
) -> tuple[list[Message], str | None]:
    """Put text after the system text, before the last user text, or after it."""
    if insert.slot == "system":
        return messages, text if system is None else f"{system}\n\n{text}"
    places = _user_places(messages)
    if not places:
        raise TrimtabError(
            f"a {insert.slot} of the last user text",
            "a conversation without a user message",
            "add a user message, or use the slot 'system'",
        )
    parts = [text, messages[places[-1]]["content"]]
    content = insert.separator.join(parts if insert.slot == "prefix" else reversed(parts))
    return _with_user(messages, places[-1], content), system


def _user_places(messages: list[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "user"]


def _with_user(messages: list[Message], place: int, content: str) -> list[Message]:
    return [*messages[:place], {"role": "user", "content": content}, *messages[place + 1 :]]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer ("<|im_end|>"), else the eos token."""
    eos = tokenizer.eos_token
    eos = eos if isinstance(eos, str) else ""
    if not _templated(tokenizer):
        return eos
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARKER}]
    text = _apply(tokenizer, messages, answer=False)
    # The line break that many templates write next belongs to the following turn: no model has to
    # say it.
    return text.rpartition(_MARKER)[2].strip() or eos


def _messages(prompt: Prompt) -> list[Message]:
    """A checked conversation."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    advice = 'give a string, or messages such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise TrimtabError(
            f"prompt {prompt!r}", f"{type(prompt).__name__} that is no prompt", advice
        )
    for message in prompt:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise TrimtabError(f"message {message!r}", "no role and content strings", advice)
    if prompt[-1]["role"] == "assistant":
        raise TrimtabError(
            "a prompt that ends with an assistant message",
            "nothing left for the assistant to answer",
            "give the assistant's text as the completion",
        )
    return [dict(message) for message in prompt]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], answer: bool = True) -> str:
    """The template's text for a conversation."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except TemplateError as error:
        raise TrimtabError(
            f"the conversation {[message['role'] for message in messages]}",
            f"the chat template refuses it: {error}",
            "use the roles and the order that the model's template takes",
        ) from error
    return str(text)


def _place_system(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], content: str
) -> list[Message]:
    """Put the system text where this template shows it to the model."""
    candidate = [{"role": "system", "content": content}, *messages]
    try:
        # Some templates raise on a system message, others drop it without a word: look for the text
        # itself.
        if content.strip() in _apply(tokenizer, candidate):
            return candidate
    except TrimtabError:
        pass
    if places := _user_places(messages):
        folded = f"{content}\n\n{messages[places[0]]['content']}"
        return _with_user(messages, places[0], folded)
    raise TrimtabError(
        f"system text {content!r}",
        "a template without a system role, and no user message to put it in",
        "add a user message",
    )


def _user_end(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> int:
    """The character after the last user text; the whole length when there is none."""
    places = _user_places(messages)
    if not places:
        return len(text)
    # Searching for the user's words would be fooled by a short one ("a") that the template's own
    # tail contains.
    marked = _with_user(messages, places[-1], _MARKER)
    _, found, tail = _apply(tokenizer, marked).rpartition(_MARKER)
    if found and text.endswith(tail):
        return len(text) - len(tail)
    content = messages[places[-1]]["content"].strip()
    start = text.rfind(content)
    return len(text) if start < 0 else start + len(content)
