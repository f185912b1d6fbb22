"""A soft prompt as a value, and what became of it when it was baked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from trimtab.errors import TrimtabError
from trimtab.results.tables import Printable, Table
from trimtab.steering.prompt import PromptSteering

SLOTS = ("start", "prefix", "suffix")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Vectors of the stream into block 0, before the prompt.

    Attributes:
        vectors: float32 `[n, d_model]`, in the units of the `embed` site (before learned position
            embeddings, which the model adds to them as to any token).
        name: what the new tokens are called, `<name_0>`, `<name_1>`...
        slot: where the chat template puts them: `start`, after its beginning-of-text token;
            `prefix`, before the last user text; `suffix`, after it.
        separator: text between them and the user's, for `prefix` and `suffix`.
        fingerprint: of the model they were made for; empty when unknown.

    Raises:
        TrimtabError: no vectors, or values that are not finite, a name of other signs than letters,
            digits and underscores, or an unknown slot.
    """

    vectors: Tensor
    name: str = "soft"
    slot: str = "start"
    separator: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.slot not in SLOTS:
            raise TrimtabError(
                asked=f"to bake a soft prompt in the slot {self.slot!r}",
                found="no place for it in a chat template",
                advice=f"use a soft prompt in one of the slots {', '.join(SLOTS)}",
            )
        good = self.vectors.ndim == 2 and min(self.vectors.shape) > 0
        if not good or not bool(self.vectors.isfinite().all()) or not re.fullmatch(r"\w+", self.name):  # fmt: skip
            raise TrimtabError(
                asked=f"the soft prompt {self.name!r}",
                found=f"values of shape {list(self.vectors.shape)}",
                advice="give finite values [tokens, d_model] and a name of letters and digits",
            )
        object.__setattr__(self, "vectors", self.vectors.detach().float().cpu())

    @property
    def tokens(self) -> tuple[str, ...]:
        """The new tokens."""
        return tuple(f"<{self.name}_{n}>" for n in range(self.vectors.shape[0]))

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str = "soft") -> SoftPrompt:
        """Read a safetensors file that holds one tensor `[n, d_model]`.

        Raises:
            TrimtabError: another kind of file.
        """
        try:
            tensors = load_file(Path(path))
        except (OSError, SafetensorError) as error:
            found = str(error)
        else:
            if len(tensors) == 1:
                return cls(next(iter(tensors.values())), name)
            found = f"{len(tensors)} tensors"
        raise TrimtabError(
            asked=f"the soft prompt {os.fspath(path)}",
            found=found,
            advice="give a safetensors file with one tensor [tokens, d_model]",
        )

    @classmethod
    def of(cls, steering: PromptSteering, config: PretrainedConfig) -> SoftPrompt:
        """Take a soft prompt lever, whose vectors are `inputs_embeds`, which some models scale.

        Raises:
            TrimtabError: a lever that stands in the system message.
        """
        assert steering.vectors is not None
        scale = float(getattr(config, "embedding_multiplier", None) or 1.0)
        return cls(
            steering.vectors * scale,
            slot=steering.slot,
            separator=steering.separator or "",
            fingerprint=steering.fingerprint,
        )


@dataclass(frozen=True)
class PromptReport(Printable):
    """What became of a soft prompt.

    Attributes:
        path: folder of the checkpoint.
        tokens: the new tokens; their text before a prompt switches the soft prompt on where
            there is no chat template.
        ids: their numbers.
        in_template: whether the chat template puts them in.
        rounding: ||stored - meant|| / ||meant|| of the rows.
        max_logit_difference: largest difference to the base model with the vectors fed in, over
            the base's vocabulary and every position; None where not checked.
        equal_text: whether the greedy answers are the same.
        effect: largest change of a logit that the soft prompt makes at the last position.
    """

    path: Path
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    in_template: bool
    rounding: float
    max_logit_difference: float | None = None
    equal_text: bool | None = None
    effect: float | None = None

    def table(self) -> Table:
        """Return one line per fact."""
        unknown = "not checked"
        difference, effect = self.max_logit_difference, self.effect
        rows = (
            ("route", "soft prompt to vocabulary"),
            ("folder", str(self.path)),
            ("tokens", "".join(self.tokens)),
            (
                "put in by the chat template",
                "yes" if self.in_template else "no: write them yourself",
            ),
            ("rounding of the rows", f"{self.rounding:.2g}"),
            ("largest logit difference", unknown if difference is None else f"{difference:.2g}"),
            ("largest effect on a logit", unknown if effect is None else f"{effect:.2g}"),
            ("greedy text equal", {None: unknown, True: "yes", False: "no"}[self.equal_text]),
        )
        return Table("soft prompt baked", ("what", "found"), rows)
