"""Soft prompt to vocabulary: new tokens whose embedding rows are the soft prompt.

The rows are divided by the model's embedding scale, so that the stream into block 0 is the soft
prompt itself, in any runtime that looks tokens up. The tokens go into the tokenizer, and into the
chat template: right after its beginning-of-text token, or where the prompt lever puts them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from trimtab.errors import TrimtabError
from trimtab.models.baked import RECORD
from trimtab.models.chat import Prompt
from trimtab.results.files import staged
from trimtab.results.tables import write_json
from trimtab.steering.format import METADATA_KEY
from trimtab.steering.load import load_steering
from trimtab.steering.norms import NEUTRAL_PROMPTS
from trimtab.steering.prompt import PromptSteering
from trimtab.weights.card import front_matter, one_line
from trimtab.weights.disk.base import Model, folder_of
from trimtab.weights.disk.checkpoint import DTYPES, open_checkpoint
from trimtab.weights.disk.draft import Draft, start_draft
from trimtab.weights.disk.sources import PIECE, Bytes, Copy, TensorSource, Value, Zeros
from trimtab.weights.disk.stream import check_space, write
from trimtab.weights.soft.check import check_prompt
from trimtab.weights.soft.template import add_to_template
from trimtab.weights.soft.value import PromptReport, SoftPrompt


@dataclass(frozen=True, eq=False)
class Joined:
    """Rows of several sources as one tensor."""

    parts: tuple[TensorSource, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def home(self) -> Path | None:
        return self.parts[0].home

    def pieces(self) -> Iterator[Bytes]:
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
    given = soft if isinstance(soft, SoftPrompt | PromptSteering) else read_soft(soft)
    if isinstance(given, PromptSteering) and given.vectors is None:
        raise TrimtabError(
            asked=f"to bake {given.label}",
            found="a prompt in words, which has no place in the weights",
            advice="bake a vector, a low-rank update or a soft prompt; words go into the prompt",
        )
    target = Path(out)
    with staged(target) as building:
        folder, name = folder_of(model, building / ".base")
        draft = start_draft(open_checkpoint(folder))
        config = draft.base.config
        prompt = given if isinstance(given, SoftPrompt) else SoftPrompt.of(given, config)
        if prompt.vectors.shape[1] != config.hidden_size:
            raise TrimtabError(
                asked="to bake a soft prompt",
                found=f"width {prompt.vectors.shape[1]}, {config.hidden_size} needed",
                advice="use a soft prompt that was made for this model",
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = _add_tokens(tokenizer, prompt)
        _add_rows(draft, prompt, ids)
        text = "".join(prompt.tokens)
        in_template = add_to_template(tokenizer, prompt.slot, text, prompt.separator)
        check_space(draft, target, link)
        write(draft, building, link)
        tokenizer.save_pretrained(building)
        _suppress(building, ids)
        rounding = draft.rounding.get(_ROWS, 0.0)
        report = PromptReport(target, prompt.tokens, ids, in_template, rounding)
        if verify:
            report = check_prompt(draft, building, prompt, report, prompts)
        _describe(building, name, prompt, report, draft.steps)
        shutil.rmtree(building / ".base", ignore_errors=True)
    return report


def read_soft(path: str | os.PathLike[str]) -> SoftPrompt | PromptSteering:
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
    parts: list[TensorSource] = [table.rows(0, min(first, rows))]
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
    "start": "The chat template puts them before every conversation.",
    "prefix": "The chat template puts them before the last user text.",
    "suffix": "The chat template puts them after the last user text.",
}


def _describe(
    folder: Path, base: str, prompt: SoftPrompt, report: PromptReport, steps: list[str]
) -> None:
    facts = {k: v for k, v in report.to_dict().items() if k != "path"}
    facts["route"] = "soft prompt to vocabulary"
    record = {"format": 1, "base_model": base, "steps": steps, "checked": facts}
    write_json(folder / RECORD, record)
    use = (
        _PLACES[prompt.slot]
        if report.in_template
        else f"Write `{''.join(prompt.tokens)}` before the prompt to switch it on."
    )
    (folder / "README.md").write_text(
        f"{front_matter('transformers', base)}\n"
        f"# {one_line(base)}, with a soft prompt in its vocabulary\n\n"
        f"{len(prompt.tokens)} tokens, `{prompt.tokens[0]}` and on, have a soft prompt's vectors as"
        f" their embeddings. {use} To undo it, leave them out or use the base model.\n",
        encoding="utf-8",
    )
