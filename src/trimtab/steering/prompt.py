"""The prompt lever: text or soft tokens in a slot of every prompt, on or off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.chat import SEPARATORS, SLOTS, Insert
from trimtab.models.model import LanguageModel
from trimtab.models.opened import opened
from trimtab.steering.format import PromptHeader, SoftPromptHeader, expect, write
from trimtab.steering.soft_tokens import soft_tokens


@dataclass(frozen=True, eq=False)
class PromptSteering:
    """A prompt as a lever: strength 1 uses it, strength 0 does not.

    Attributes:
        text: what is put into the slot; empty for a soft prompt.
        strength: 1 or 0.
        slot: `system`, the system message; `prefix`, before the last user text; `suffix`,
            after it.
        separator: text between a prefix or suffix and the user's text; by default a space after a
            prefix and nothing before a suffix, which begins with its own.
        vectors: of a soft prompt, float32 `[k, d_model]` on the CPU, in the units of
            `inputs_embeds`; they stand where the text's tokens would.
        provenance: JSON-able record of where this came from.
        fingerprint: of the model a soft prompt was made for; empty when unknown.
        model_name: that model's name or folder.

    Raises:
        TrimtabError: an empty text, text beside vectors, an unknown slot, vectors that are not
            finite, or a strength between (a prompt cannot be half there).
    """

    text: str
    strength: float = 1.0
    slot: str = field(default="system", kw_only=True)
    separator: str | None = field(default=None, kw_only=True)
    vectors: Tensor | None = field(default=None, kw_only=True)
    provenance: dict[str, object] = field(default_factory=dict, kw_only=True)
    fingerprint: str = field(default="", kw_only=True)
    model_name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        """Check everything once."""
        choice("slot", self.slot, SLOTS)
        if self.separator is None:
            object.__setattr__(self, "separator", SEPARATORS[self.slot])
        if self.vectors is None and (not isinstance(self.text, str) or not self.text.strip()):
            raise TrimtabError(
                asked="to steer with a prompt",
                found=f"the text {self.text!r}",
                advice="give the instruction as a non-empty string",
            )
        if self.vectors is not None:
            object.__setattr__(self, "vectors", _checked(self.vectors, self.text))
        if self.strength not in (0, 1):
            raise TrimtabError(
                asked=f"a prompt at strength {self.strength}",
                found="a lever that is either there or not",
                advice="use strength 0 or 1; a steering vector can be scaled",
            )
        object.__setattr__(self, "strength", float(self.strength))

    def __eq__(self, other: object) -> bool:
        """Equal content is equal; vectors are compared bit for bit."""
        if not isinstance(other, PromptSteering):
            return NotImplemented
        mine, theirs = (
            (p.text, p.strength, p.slot, p.separator, p.provenance, p.fingerprint, p.model_name)
            for p in (self, other)
        )
        if (self.vectors is None) != (other.vectors is None) or mine != theirs:
            return False
        both = self.vectors, other.vectors
        return both[0] is None or both[1] is None or torch.equal(both[0], both[1])

    def __hash__(self) -> int:
        """By the text and its place."""
        return hash((self.text, self.slot, self.separator, self.strength))

    @property
    def label(self) -> str:
        """The beginning of the text, or the size of the soft prompt."""
        if self.vectors is not None:
            name = f"soft {self.slot} of {len(self.vectors)} tokens"
        else:
            short = self.text if len(self.text) <= 40 else self.text[:39] + "…"
            name = f'{"prompt" if self.slot == "system" else self.slot} "{short}"'
        return name + ("" if self.strength else " m=0")

    def at(self, strength: float) -> PromptSteering:
        """Return the same prompt, on (1) or off (0)."""
        return replace(self, strength=strength)

    @contextmanager
    def on(self, lm: LanguageModel) -> Iterator[None]:
        """Render every prompt of the `with` block with this in its slot; restored afterwards.

        A text in the slot `system` replaces a system text that is already set; everything else is
        put beside what is there. It counts for the thread or asyncio task that entered the block,
        as `VectorSteering.on` says.

        Raises:
            TrimtabError: a soft prompt of another width, or made for another model.
        """
        if self.fingerprint and self.fingerprint != lm.fingerprint:
            raise TrimtabError(
                asked=f"to steer {lm.name} with a soft prompt made for {self.model_name}",
                found=f"fingerprint {lm.fingerprint} instead of {self.fingerprint}",
                advice="use the model the soft prompt was made for",
            )
        if not self.strength:
            yield
        elif self.vectors is not None:
            with soft_tokens(lm, self.vectors) as ids:
                with opened(lm, "inserts", replace(self._insert, ids=ids)):
                    yield
        elif self.slot == "system":
            with opened(lm, "system", self.text):
                yield
        else:
            with opened(lm, "inserts", self._insert):
                yield

    @property
    def _insert(self) -> Insert:
        assert self.separator is not None  # set above
        return Insert(self.slot, self.text, separator=self.separator)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one steering file (docs/format.md)."""
        return write(path, *self.parts())

    def parts(self) -> tuple[PromptHeader | SoftPromptHeader, dict[str, Tensor]]:
        """Return what a steering file holds: a header, and the vectors of a soft prompt."""
        header = SoftPromptHeader if self.vectors is not None else PromptHeader
        facts = {name: value for name, value in vars(self).items() if name in header.model_fields}
        if self.vectors is not None:
            return SoftPromptHeader(kind="soft_prompt", **facts), {"vectors": self.vectors}
        if self.separator == SEPARATORS[self.slot]:
            facts["separator"] = None
        return PromptHeader(kind="prompt", **facts), {}

    @classmethod
    def from_parts(
        cls, header: PromptHeader | SoftPromptHeader, tensors: Mapping[str, Tensor]
    ) -> PromptSteering:
        """Make the steering that a file holds; see `parts`."""
        names, fields = sorted(tensors), header.model_dump(exclude={"kind"})
        if isinstance(header, PromptHeader):
            expect(not tensors, "a prompt without tensors", f"the tensors {names}")
            return cls(**fields)
        expect(names == ["vectors"], "one tensor, vectors", f"the tensors {names}")
        return cls("", vectors=tensors["vectors"], **fields)


def prompt(text: str, slot: str = "system", separator: str | None = None) -> PromptSteering:
    """Return the lever that puts `text` into the system prompt, or into another slot.

    Args:
        text: what is put there.
        slot: `system`, `prefix` or `suffix`.
        separator: between a prefix or suffix and the user's text; see `PromptSteering`.
    """
    return PromptSteering(text, slot=slot, separator=separator)


def _checked(vectors: Tensor, text: str) -> Tensor:
    good = isinstance(vectors, Tensor) and vectors.ndim == 2 and min(vectors.shape) > 0
    if not good or not bool(vectors.isfinite().all()) or text:
        shape = list(getattr(vectors, "shape", ()))
        raise TrimtabError(
            asked="a soft prompt",
            found=f"the text {text!r} beside it" if text else f"values of shape {shape}",
            advice="give finite vectors [tokens, d_model] and no text",
        )
    return vectors.detach().float().cpu().contiguous()
