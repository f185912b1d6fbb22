"""An instruction in words, and where it stands beside a request."""

from __future__ import annotations

from typing import Literal

from trimtab.models.chat import Message, Prompt

Place = Literal["after", "before", "system"]
# Which of them a model obeys is tried, not known: small models follow the end of the user's turn.
PLACES: tuple[Place, ...] = ("after", "before", "system")


def instructed(request: Prompt, instruction: str, where: Place = "after") -> Prompt:
    """Return a request with an instruction: in its last user turn, or as the system's turn.

    Args:
        request: Text or messages.
        instruction: A sentence, such as "Talk like a pirate."
        where: After or before the words of the last user turn, or `system`, in the place of any
            system turn that is there.
    """
    if isinstance(request, str) and where != "system":
        return _beside(request, instruction, where)
    messages: list[Message] = (
        [{"role": "user", "content": request}]
        if isinstance(request, str)
        else [dict(message) for message in request]
    )
    if where == "system":
        rest = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": instruction}, *rest]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last]["content"] = _beside(messages[last]["content"], instruction, where)
    return messages


def _beside(text: str, instruction: str, where: Place) -> str:
    return f"{text} {instruction}" if where == "after" else f"{instruction} {text}"
