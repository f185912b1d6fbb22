"""Prompts become text and tokens here, once, with the boundaries that scopes and readers need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from jinja2.exceptions import TemplateError

from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = "dict[str, str]"
Prompt: TypeAlias = "str | Sequence[Message]"

# Stands in for a message while the template is asked what it writes around one.
_MARKER = "trimtab0marker0text"


@dataclass(frozen=True)
class Encoded:
    """A rendered and tokenised prompt, with or without a completion.

    Attributes:
        text: The rendered text.
        ids: Its tokens, tokenised once.
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
) -> Encoded:
    """Render a prompt through the chat template where there is one, and tokenise it once.

    Args:
        tokenizer: A Hugging Face tokenizer; without a chat template a prompt is plain text.
        prompt: One user turn, or a conversation that ends where the assistant is to answer.
        system: Put in a system message where the template takes one, else in front of the first
            user text.
        completion: An answer, appended after the generation prompt and closed by the end-of-turn
            token.

    Raises:
        TrimtabError: The prompt has no known form, the template refuses it, or it has no tokens.
    """
    messages = _messages(prompt)
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        messages = _place_system(tokenizer, messages, system)
        text = _apply(tokenizer, messages)
        user_end = _user_end(tokenizer, messages, text)
    else:
        text = _plain(messages, system)
        user_end = len(text)
    prompt_end = len(text)
    if completion is not None:
        text += completion + end_of_turn(tokenizer)
    ids, count_until = _tokenise(tokenizer, text, add_special_tokens=not templated)
    prompt_length = count_until(prompt_end, False) if completion is not None else len(ids)
    if prompt_length == 0:
        raise TrimtabError(f"prompt {prompt!r}", "no tokens", "give a prompt with some text")
    instruction_end = (
        min(count_until(user_end, True), prompt_length) if templated else prompt_length
    )
    completion_end = None if completion is None else count_until(prompt_end + len(completion), True)
    return Encoded(text, ids, prompt_length, instruction_end, completion_end)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer ("<|im_end|>"), else the eos token."""
    eos = tokenizer.eos_token
    eos = eos if isinstance(eos, str) else ""
    if not getattr(tokenizer, "chat_template", None):
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


def _plain(messages: list[Message], system: str | None) -> str:
    """The text of a prompt for a model without a chat template."""
    parts = [] if system is None else [system]
    if messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise TrimtabError(
            f"a conversation of {len(messages)} turns",
            "a tokenizer without a chat template",
            "give one user turn as a string, or set tokenizer.chat_template",
        )
    return "\n\n".join([*parts, messages[0]["content"]])


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
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], system: str | None
) -> list[Message]:
    """Put the system text where this template shows it to the model."""
    parts = [] if system is None else [system]
    if messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    if not parts:
        return messages
    content = "\n\n".join(parts)
    candidate = [{"role": "system", "content": content}, *messages]
    try:
        # Some templates raise on a system message, others drop it without a word: look for the text
        # itself.
        if content.strip() in _apply(tokenizer, candidate):
            return candidate
    except TrimtabError:
        pass
    for i, message in enumerate(messages):
        if message["role"] == "user":
            folded = {"role": "user", "content": f"{content}\n\n{message['content']}"}
            return [*messages[:i], folded, *messages[i + 1 :]]
    raise TrimtabError(
        f"system text {content!r}",
        "a template without a system role, and no user message to put it in",
        "add a user message",
    )


def _user_end(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> int:
    """The character after the last user text; the whole length when there is none."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        return len(text)
    # Searching for the user's words would be fooled by a short one ("a") that the template's own
    # tail contains.
    marked = [*messages[:last], {"role": "user", "content": _MARKER}, *messages[last + 1 :]]
    _, found, tail = _apply(tokenizer, marked).rpartition(_MARKER)
    if found and text.endswith(tail):
        return len(text) - len(tail)
    content = messages[last]["content"].strip()
    start = text.rfind(content)
    return len(text) if start < 0 else start + len(content)


def _tokenise(
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
