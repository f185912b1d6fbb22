"""Soft prompt to vocabulary: new tokens whose embedding rows are the soft prompt.

The rows are divided by the model's embedding scale, so that the stream into block 0 is the soft
prompt itself, in any runtime that looks tokens up. The tokens go into the tokenizer, and into the
chat template: right after its beginning-of-text token, or where the prompt lever puts them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from trimtab.chat import Prompt
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.prompt_steering import PromptSteering
from trimtab.steering_file import METADATA_KEY, load_steering
from trimtab.strength.norms import NEUTRAL_PROMPTS
from trimtab.tables import Printable, Table, write_json
from trimtab.weights.base import Model, folder_of, save_model
from trimtab.weights.checkpoint import DTYPES, open_checkpoint
from trimtab.weights.draft import Draft, start_draft
from trimtab.weights.record import RECORD
from trimtab.weights.soft_template import add_to_template
from trimtab.weights.sources import PIECE, Copy, Source, Value, Zeros
from trimtab.weights.staging import staged
from trimtab.weights.stream import check_space, write

SLOTS = ("start", "prefix", "suffix")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Vectors of the stream into block 0, in front of the prompt.

    Attributes:
        vectors: float32 `[n, d_model]`, in the units of the `embed` site (before learned position
            embeddings, which the model adds to them as to any token).
        name: what the new tokens are called, `<name_0>`, `<name_1>`...
        slot: where the chat template puts them: `start`, after its beginning-of-text token;
            `prefix`, in front of the last user text; `suffix`, behind it.
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
        """Check shape and values."""
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
        """Take a soft prompt lever, whose vectors are in the units of `inputs_embeds`.

        Args:
            steering: the lever.
            config: of its model, some of which scale what goes in as `inputs_embeds`.

        Raises:
            TrimtabError: a lever that is text, or stands in the system message.
        """
        if steering.vectors is None:
            raise TrimtabError(
                asked=f"to bake {steering.label}",
                found="a prompt in words, which has no place in the weights",
                advice="bake a vector or a soft prompt; words go into the prompt",
            )
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
        tokens: the new tokens; their text in front of a prompt switches the soft prompt on where
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
            ),  # fmt: skip
            ("rounding of the rows", f"{self.rounding:.2g}"),
            ("largest logit difference", unknown if difference is None else f"{difference:.2g}"),
            ("largest effect on a logit", unknown if effect is None else f"{effect:.2g}"),
            ("greedy text equal", {None: unknown, True: "yes", False: "no"}[self.equal_text]),
        )
        return Table("soft prompt baked", ("what", "found"), rows)


@dataclass(frozen=True, eq=False)
class Joined:
    """Rows of several sources as one tensor."""

    parts: tuple[Source, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """That of the parts."""
        return self.parts[0].dtype

    @property
    def home(self) -> Path | None:
        """Where the first part lies."""
        return self.parts[0].home

    def pieces(self) -> Iterator[bytes | memoryview]:
        """One part after the other."""
        for part in self.parts:
            yield from part.pieces()


def bake_prompt(
    model: Model,
    soft: SoftPrompt | PromptSteering | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    verify: bool = True,
    prompts: Sequence[Prompt] = NEUTRAL_PROMPTS[:2],
    link: bool = True,
) -> PromptReport:
    """Write a checkpoint whose vocabulary holds a soft prompt and whose chat template uses it.

    Tied embeddings are untied: as rows of the unembedding the vectors would be answers. There the
    new tokens get the mean row, with which none of them is ever the likeliest.

    Args:
        model: a folder, a hub id, "harbor" or a loaded model.
        soft: the vectors, a soft prompt lever, or a file of either.
        out: folder to create.
        verify: reload, and compare with the base model that is fed the vectors.
        prompts: what is compared.
        link: False copies unchanged files instead of sharing them.

    Raises:
        TrimtabError: vectors of another width; an unknown architecture; tokens that exist already;
            a reload that is not equal.
    """
    from trimtab.weights.soft_check import check_prompt

    given = soft if isinstance(soft, SoftPrompt | PromptSteering) else _read(soft)
    target = Path(out)
    with staged(target) as building:
        if isinstance(model, LanguageModel):
            folder = building / ".base"
            save_model(model, folder)
        else:
            folder, _ = folder_of(model)
        draft = start_draft(open_checkpoint(folder))
        config = draft.base.config
        prompt = given if isinstance(given, SoftPrompt) else SoftPrompt.of(given, config)
        if prompt.vectors.shape[1] != draft.base.config.hidden_size:
            raise TrimtabError(
                asked="to bake a soft prompt",
                found=f"width {prompt.vectors.shape[1]}, {draft.base.config.hidden_size} needed",
                advice="use a soft prompt that was made for this model",
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = _add_tokens(tokenizer, prompt)
        _add_rows(draft, prompt, ids)
        in_template = add_to_template(
            tokenizer, prompt.slot, "".join(prompt.tokens), prompt.separator
        )
        check_space(draft, target, link)
        write(draft, building, link)
        tokenizer.save_pretrained(building)
        _suppress(building, ids)
        report = PromptReport(
            target, prompt.tokens, ids, in_template, draft.rounding.get(_ROWS, 0.0)
        )
        if verify:
            report = check_prompt(draft, building, prompt, report, prompts)
        _describe(building, prompt, report, draft)
        shutil.rmtree(building / ".base", ignore_errors=True)
    return report


def _read(path: str | os.PathLike[str]) -> SoftPrompt | PromptSteering:
    """Read a steering file, or a file with one tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            steering = METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        steering = False
    if not steering:
        return SoftPrompt.load(path)
    lever = load_steering(path)
    if isinstance(lever, PromptSteering):
        return lever
    raise TrimtabError(
        asked=f"to bake the soft prompt {os.fspath(path)}",
        found=f"a vector, {lever.label}",
        advice="bake a vector with `bake`",
    )


_ROWS = "the rows of the soft prompt"


def _add_tokens(tokenizer: Any, prompt: SoftPrompt) -> tuple[int, ...]:
    known = [token for token in prompt.tokens if token in tokenizer.get_vocab()]
    if not known:
        tokenizer.add_tokens(list(prompt.tokens), special_tokens=True)
        ids = tuple(tokenizer.convert_tokens_to_ids(list(prompt.tokens)))
        if ids == tuple(range(ids[0], ids[0] + len(ids))):
            return ids
    raise TrimtabError(
        asked=f"new tokens called {prompt.name}",
        found=f"a vocabulary that has {known or 'no room for them in a row'}",
        advice="choose another name for the soft prompt",
    )


def _add_rows(draft: Draft, prompt: SoftPrompt, ids: tuple[int, ...]) -> None:
    layout = draft.layout
    draft.untie()
    embedding, head = draft.outer[layout.embedding], draft.outer[layout.head]
    assert isinstance(embedding, Copy) and isinstance(head, Copy)  # a fresh draft
    rows = prompt.vectors.double() / layout.embed_scale
    small = Zeros(embedding.dtype, tuple(rows.shape))
    stored = draft.value(rows, small, _ROWS)
    draft.outer[layout.embedding] = _with_rows(embedding, ids, stored)
    silent = _mean_row(head).to(stored.tensor.dtype).expand(len(ids), -1).contiguous()
    draft.outer[layout.head] = _with_rows(head, ids, Value(silent))
    draft.raw["vocab_size"] = draft.outer[layout.embedding].shape[0]
    draft.steps.append(f"give the tokens {ids[0]} to {ids[-1]} the soft prompt's vectors")


def _mean_row(table: Copy) -> Tensor:
    """Return the mean of a table's rows, float64 `[d_model]`.

    As a row of the unembedding its logit is the mean of all logits: below the largest whatever the
    model says, so greedy answers never hold it, and a sample hardly ever.
    """
    rows, width = table.shape
    total, height = torch.zeros(width, dtype=torch.float64), max(1, PIECE // (8 * width))
    for first in range(0, rows, height):
        total += table.read(first, min(rows, first + height)).double().sum(0)
    return total / rows


def _with_rows(table: Copy, ids: tuple[int, ...], new: Value) -> Joined:
    """The table with rows `ids` replaced (models keep spare rows) or appended."""
    rows, width = table.shape
    first, stop = ids[0], ids[-1] + 1
    parts: list[Source] = [table.rows(0, min(first, rows))]
    if first > rows:
        parts.append(Zeros(table.dtype, (first - rows, width)))
    parts.append(new)
    if stop < rows:
        parts.append(table.rows(stop, rows))
    assert DTYPES[table.dtype] == new.tensor.dtype
    return Joined(tuple(parts), (max(rows, stop), width))


def _suppress(folder: Path, ids: tuple[int, ...]) -> None:
    """Tell generation never to answer with the new tokens, where it listens."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings["suppress_tokens"] = [*(settings.get("suppress_tokens") or []), *ids]
    write_json(path, settings)


_PLACES = {
    "start": "The chat template puts them in front of every conversation.",
    "prefix": "The chat template puts them in front of the last user text.",
    "suffix": "The chat template puts them behind the last user text.",
}


def _describe(folder: Path, prompt: SoftPrompt, report: PromptReport, draft: Draft) -> None:
    facts = {k: v for k, v in report.to_dict().items() if k != "path"}
    facts["route"] = "soft prompt to vocabulary"
    name = draft.base.folder.name
    base = "a model in memory" if name == ".base" else name
    record = {"format": 1, "base_model": base, "steps": draft.steps, "checked": facts}
    write_json(folder / RECORD, record)
    use = (
        _PLACES[prompt.slot]
        if report.in_template
        else f"Write `{''.join(prompt.tokens)}` in front of the prompt to switch it on."
    )
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags:\n- trimtab\n- steering\n---\n"
        f"# {base}, with a soft prompt in its vocabulary\n\n"
        f"{len(prompt.tokens)} tokens, `{prompt.tokens[0]}` and on, have a soft prompt's vectors as"
        f" their embeddings. {use} To undo it, leave them out or use the base model.\n",
        encoding="utf-8",
    )
