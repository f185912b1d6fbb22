"""The parts of a behavior: examples, readout words, judges; and where in it something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from trimtab.errors import TrimtabError
from trimtab.models.chat import Message, Prompt

Location: TypeAlias = tuple[str | int, ...]
_PROMPT_ADVICE = (
    'give text, a list of {"role", "content"} messages, or {"prompt": ..., "completion": ...}'
)


class BehaviorError(TrimtabError):
    """A behavior that cannot be used; `location` says where in it, e.g. ("toward", 3, "prompt")."""

    def __init__(self, location: Location, found: str, advice: str) -> None:
        super().__init__(f"a behavior with {describe(location)}", found, advice)
        self.location = location

    def __reduce__(self) -> tuple[type[BehaviorError], tuple[Location, str, str]]:
        """Copies and other processes get the same error."""
        return BehaviorError, (self.location, self.found, self.advice)


def describe(location: Location) -> str:
    """Write a location as a reader of the file would: `toward[3].prompt`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "this content"


@dataclass(frozen=True)
class Example:
    """A prompt, and the answer that goes with it when one is known.

    A message list is kept as a tuple of `{"role", "content"}` dicts.

    Raises:
        TrimtabError: an empty or non-string prompt or completion, or messages that end with the
            assistant's words.
    """

    prompt: Prompt
    completion: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", prompt_at(self.prompt, ("prompt",)))
        if self.completion is not None:
            text_at(self.completion, ("completion",))

    def __hash__(self) -> int:
        """Messages are dicts, so the key is hashed in their stead."""
        return hash((self.key, self.completion))

    @property
    def key(self) -> str:
        """The prompt in one form, white space aside, for finding duplicates."""
        prompt = self.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return json.dumps([[m["role"], " ".join(m["content"].split())] for m in messages])

    def to_dict(self) -> str | list[dict[str, str]] | dict[str, Any]:
        """Return the shortest plain form that a file can hold."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        return (
            prompt if self.completion is None else {"prompt": prompt, "completion": self.completion}
        )


@dataclass(frozen=True)
class Readout:
    """Words that open an answer which shows the behavior, and words that open its opposite.

    Raises:
        TrimtabError: an empty side, or a word on both.
    """

    toward: tuple[str, ...]
    away: tuple[str, ...]

    def __post_init__(self) -> None:
        for side in ("toward", "away"):
            words = getattr(self, side)
            if isinstance(words, str) or not isinstance(words, Sequence) or not words:
                refuse(("readout", side), shown(words), "give a list of words, one at least")
            words = tuple(text_at(w, ("readout", side, i)) for i, w in enumerate(words))
            object.__setattr__(self, side, words)
        for i, word in enumerate(self.away):
            if word in self.toward:
                refuse(
                    ("readout", "away", i), f"{word!r} on both sides", "leave it on one side only"
                )

    def to_dict(self) -> dict[str, list[str]]:
        """Return the form that a file holds."""
        return {"toward": list(self.toward), "away": list(self.away)}


@dataclass(frozen=True)
class JudgeSpec:
    """Names a registered judge (or coherence scorer) and its options."""

    kind: str
    options: Mapping[str, Any]

    def __hash__(self) -> int:
        """Options are a dict, so the kind stands for them."""
        return hash(self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Return the form that a file holds: the kind and its options side by side."""
        return {"kind": self.kind, **self.options}


def refuse(location: Location, found: str, advice: str) -> NoReturn:
    """Raise the error for a place in a behavior."""
    raise BehaviorError(location, found, advice)


def shown(value: object) -> str:
    """Describe a value of the wrong type, shortly."""
    if value is None:
        return "nothing"
    text = repr(value)
    kind = "a boolean" if isinstance(value, bool) else f"a {type(value).__name__}"
    return f"{kind}, {text if len(text) <= 60 else text[:57] + '...'}"


def text_at(value: object, location: Location) -> str:
    """Return text that is not empty, or refuse."""
    if not isinstance(value, str):
        refuse(location, shown(value), "give text (in a file: put it in quotes)")
    if not value.strip():
        refuse(location, "empty text", "write the text or remove the entry")
    return value


def prompt_at(value: object, location: Location) -> Prompt:
    """Return text, or a tuple of messages that the assistant is to answer, or refuse."""
    if isinstance(value, str):
        return text_at(value, location)
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        refuse(location, shown(value), _PROMPT_ADVICE)
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            refuse((*location, i), shown(message), _PROMPT_ADVICE)
        _only(message, ("role", "content"), (*location, i))
        for key in ("role", "content"):
            if key not in message:
                refuse((*location, i), f"a message without {key}", _PROMPT_ADVICE)
        role = text_at(message["role"], (*location, i, "role"))
        content = text_at(message["content"], (*location, i, "content"))
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "assistant":
        refuse(
            (*location, len(messages) - 1),
            "a prompt that ends with the assistant's words",
            "give them as the completion: {prompt: [...], completion: ...}",
        )
    return tuple(messages)


def _only(
    given: Mapping[Any, Any], allowed: Sequence[str], location: Location, advice: str = ""
) -> None:
    for key in given:
        if key not in allowed:
            allows = advice or f"allowed: {', '.join(allowed)}"
            refuse((*location, str(key)), f"unknown key {key!r}", allows)


def examples_at(listed: object, field: str) -> tuple[Example, ...]:
    """Return the examples of a list in any of the forms allowed, or refuse."""
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        refuse((field,), shown(listed), "give a list of prompts")
    return tuple(example_at(item, (field, i)) for i, item in enumerate(listed))


def example_at(item: object, location: Location) -> Example:
    """Return one example, or refuse."""
    if isinstance(item, Example):
        return item
    if not isinstance(item, Mapping):
        return Example(prompt_at(item, location))
    one_message = "a conversation is a list of messages, also when it has only one"
    _only(item, ("prompt", "completion"), location, one_message if "role" in item else "")
    if "prompt" not in item:
        refuse(location, "an example without a prompt", _PROMPT_ADVICE)
    prompt = prompt_at(item["prompt"], (*location, "prompt"))
    completion = item.get("completion")
    if completion is not None:
        text_at(completion, (*location, "completion"))
    return Example(prompt, completion)


def readout_at(given: object) -> Readout | None:
    """Return readout words given as a Readout or a dict, or refuse."""
    if given is None or isinstance(given, Readout):
        return given
    if isinstance(given, Mapping):
        _only(given, ("toward", "away"), ("readout",))
    if not isinstance(given, Mapping) or len(given) < 2:
        refuse(("readout",), shown(given), "give {toward: [words], away: [words]}")
    return Readout(given["toward"], given["away"])


def spec_at(given: object, field: str) -> JudgeSpec | None:
    """Return a judge given by kind, dict or JudgeSpec, or refuse."""
    if given is None or isinstance(given, JudgeSpec):
        return given
    options = {"kind": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or "kind" not in options:
        refuse((field,), shown(given), "give {kind: ..., option: value}")
    rest = {str(key): value for key, value in options.items() if key != "kind"}
    try:
        json.dumps(rest, allow_nan=False)
    except (TypeError, ValueError) as error:
        refuse((field,), f"options that JSON cannot hold ({error})", "use plain values")
    return JudgeSpec(text_at(options["kind"], (field, "kind")), rest)
