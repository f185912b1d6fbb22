"""Scopes: which token positions are steered.

Positions are absolute: the first real token of a row is 0 and padding is not counted, so a scope
means the same with and without a KV cache, alone and in a batch, and for a prompt that is fed in
chunks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

NAMES = ("all", "last", "prompt", "post_instruction", "generated")
_WINDOW = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*\)")


@dataclass(frozen=True)
class Scope:
    """A set of token positions; make one with `Scope.parse`.

    Attributes:
        name: One of `NAMES`, or "window".
        start: First position of a window.
        stop: First position after a window.
    """

    name: str
    start: int = 0
    stop: int = 0

    @staticmethod
    def parse(text: str | Scope) -> Scope:
        """Read "all", "last", "prompt", "post_instruction", "generated" or a window "[a,b)".

        Raises:
            TrimtabError: The text is none of these, or the window is empty.
        """
        if isinstance(text, Scope):
            return text
        if isinstance(text, str):
            if text in NAMES:
                return Scope(text)
            if match := _WINDOW.fullmatch(text.strip()):
                start, stop = int(match[1]), int(match[2])
                if start < stop:
                    return Scope("window", start, stop)
        raise TrimtabError(
            f"scope {text!r}",
            "no such scope",
            f"use one of {', '.join(NAMES)}, or a window such as [0,5) with a < b",
        )

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return f"[{self.start},{self.stop})" if self.name == "window" else self.name

    @property
    def needs_prompt(self) -> bool:
        """Whether the scope depends on where the prompt ends."""
        return self.name in ("last", "prompt", "generated", "post_instruction")

    def mask(
        self,
        positions: Tensor,
        real: Tensor,
        prompt_length: Tensor | None = None,
        instruction_end: Tensor | None = None,
    ) -> Tensor:
        """Say which tokens are steered.

        Args:
            positions: Absolute positions, integer `[batch, seq]`.
            real: False where a token is padding, bool `[batch, seq]`.
            prompt_length: Tokens before the answer's first, `[batch]`.
            instruction_end: Position of the first token after the last user text, `[batch]`.

        Returns:
            bool `[batch, seq]`; padding is never steered.

        Raises:
            TrimtabError: The scope needs a boundary that is unknown, or its span is empty.
        """
        if self.name == "all":
            return real
        if self.name == "window":
            return (positions >= self.start) & (positions < self.stop) & real
        if prompt_length is None:
            raise TrimtabError(
                f"scope {self}",
                "a call whose prompt boundary is unknown",
                "use lm.generate or lm.forward, or wrap the model's calls in lm.calling(batch)",
            )
        end = prompt_length[:, None]
        if self.name == "last":
            return (positions >= end - 1) & real
        if self.name == "generated":
            return (positions >= end) & real
        if self.name == "prompt":
            return (positions < end) & real
        if instruction_end is None:
            raise TrimtabError(
                "scope post_instruction",
                "a direct call of the model, which does not say where the user's text ends",
                "use lm.generate, lm.forward or lm.calling(batch), or use scope last",
            )
        if bool(torch.any(instruction_end >= prompt_length)):
            raise TrimtabError(
                "scope post_instruction",
                "no tokens between the user's text and the answer (no chat template?)",
                "use scope last",
            )
        return (positions >= instruction_end[:, None]) & (positions < end) & real
