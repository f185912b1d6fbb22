"""Baking: write the steering into a checkpoint, reload it, and keep it only if it is equal."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from trimtab.errors import TrimtabError
from trimtab.models.baked import RECORD
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.results import Progress
from trimtab.results.files import staged
from trimtab.results.tables import write_json
from trimtab.steering.norms import NEUTRAL_PROMPTS
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled
from trimtab.weights.card import model_card, record_of
from trimtab.weights.disk.base import Model, folder_of
from trimtab.weights.disk.checkpoint import open_checkpoint
from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.disk.stream import check_space, write
from trimtab.weights.plan import BakeReport, Plan, prepare, refuse_early
from trimtab.weights.routes.low_rank import at_every_writer
from trimtab.weights.slices import write_slices
from trimtab.weights.soft.prompt import bake_prompt
from trimtab.weights.soft.value import PromptReport, SoftPrompt
from trimtab.weights.verify import (
    Base,
    compare_models,
    compare_slices,
    compare_tensors,
    compare_wide,
    fits_memory,
)

__all__ = ["BakeReport", "bake", "plan"]

Levers = Scaled | Together | Sequence[Scaled]
Soft = SoftPrompt | PromptSteering


# The overloads say what comes back; the options stand once, below.
@overload
def bake(model: Model, lever: Soft, out: str | os.PathLike[str], **how: Any) -> PromptReport: ...
@overload
def bake(model: Model, lever: Levers, out: str | os.PathLike[str], **how: Any) -> BakeReport: ...
def bake(  # pyright: ignore[reportInconsistentOverload]
    model: Model,
    lever: Levers | Soft,
    out: str | os.PathLike[str],
    *,
    verify: bool | str = True,
    prompts: Sequence[Prompt] = NEUTRAL_PROMPTS[:4],
    route: str | None = None,
    every_writer: int | None = None,
    copy: bool = False,
    progress: Progress | None = None,
) -> BakeReport | PromptReport:
    """Write a checkpoint that steers itself, from any lever that weights can hold.

    The folder holds weights, config, generation config, tokenizer with its chat template, a model
    card and a record of what was done. It is built beside `out` and renamed there at the end, so
    `out` is complete or absent; what a killed run left is removed by the next one. Given a folder
    or hub id, no tensor is held in memory whole and files that do not change are shared with the
    base by hard links; a loaded model is saved first, as it is now. The model itself is left alone.

    Args:
        model: a folder, a hub id, "harbor" or a loaded model; the one the levers were made for.
        lever: a vector or low-rank update at the strength to bake, several that would be on
            together, or a soft prompt, which becomes tokens of the vocabulary.
        out: folder to create; an existing empty one is taken.
        verify: True compares the reloaded whole model, or a slice where it does not fit into
            memory; "slice" always a slice; False only writes.
        prompts: what the reloaded model is compared on.
        route: only `bias`, `null_block` or `convert` for what is added, where there is a choice.
        every_writer: ablate this layer's direction wherever the stream is written, see
            `trimtab.weights.at_every_writer`.
        copy: whether unchanged files are copied, so that nothing is shared with the base's folder.
        progress: called with (bytes done, bytes in all); not for a soft prompt.

    Raises:
        TrimtabError: a prompt in words, which has no place in the weights; no exact route (the plan
            says why, and what is nearest); another model's vector; a folder with something in it;
            too little space; a checkpoint that does not reload as what it was meant to be.
    """
    if isinstance(lever, Soft):
        if route is not None or every_writer is not None:
            raise TrimtabError(
                asked="to bake a soft prompt by a route of the weights",
                found="vectors that become tokens of the vocabulary, in one way",
                advice="leave out route and every_writer",
            )
        return bake_prompt(
            model, lever, out, verify=bool(verify), prompts=prompts[:2], link=not copy
        )
    vectors, link, target = _listed(lever, every_writer), not copy, Path(out)
    lm = model if isinstance(model, LanguageModel) else None
    if lm is not None:
        _check_early(lm, vectors)
    with staged(target) as building:
        folder, name = folder_of(model, building / ".base")
        found, draft = prepare(open_checkpoint(folder), name, vectors, route)
        found.check()
        assert draft is not None  # check() refused where there is none
        check_space(draft, target, link)
        write(draft, building, link, progress)
        report = _reported(found, draft, lm, vectors, target)
        if verify:
            dtype = draft.dtype if lm is None else lm.model.dtype
            attention = None if lm is None else lm.model.config._attn_implementation
            routed = draft.layout.mlp != "mlp."
            base = Base(folder, target, name, lm, dtype, attention, routed)
            report = _verified(report, base, draft, building, vectors, prompts, verify == "slice")
        card = model_card(found, vectors, report)
        (building / "README.md").write_text(card, encoding="utf-8")
        write_json(building / RECORD, record_of(found, vectors, report, folder))
        shutil.rmtree(building / ".base", ignore_errors=True)
    return report


def plan(
    model: Model, lever: Levers, route: str | None = None, every_writer: int | None = None
) -> Plan:
    """Say by which exact route each steering would become weights, at what cost, or why it cannot.

    Nothing is loaded and nothing is written (a model in memory is saved to a temporary folder).

    Args:
        model: as for `bake`.
        lever: one steering or several.
        route: as for `bake`.
        every_writer: as for `bake`.

    Raises:
        TrimtabError: no model, or an architecture that has no routes at all.
    """
    vectors = _listed(lever, every_writer)
    if isinstance(model, LanguageModel):
        for vector in vectors:
            vector.check(model)
    with tempfile.TemporaryDirectory() as spare:
        folder, name = folder_of(model, Path(spare))
        return prepare(open_checkpoint(folder), name, vectors, route)[0]


def _listed(lever: Levers, every_writer: int | None) -> list[Scaled]:
    lever = lever.vectors if isinstance(lever, Together) else lever
    levers = [lever] if isinstance(lever, Scaled) else list(lever)
    if not levers or not all(isinstance(each, Scaled) for each in levers):
        raise TrimtabError(
            asked="to bake a steering",
            found=f"{[type(each).__name__ for each in levers] or 'nothing'}",
            advice="give vectors or low-rank updates; a soft prompt is baked alone, and a prompt in "
            "words has no place in the weights",
        )
    if every_writer is None:
        return levers
    for each in levers:
        if not isinstance(each, VectorSteering):
            raise TrimtabError(
                asked=f"to bake {each.label} at every writer",
                found="an update of weights, which has no direction to take out",
                advice="give a vector, or leave every_writer out",
            )
    vectors = [each for each in levers if isinstance(each, VectorSteering)]
    return [part for each in vectors for part in at_every_writer(each, every_writer)]


def _check_early(lm: LanguageModel, vectors: list[Scaled]) -> None:
    """Refuse what is plain before a large model is saved."""
    for vector in vectors:
        vector.check(lm)
    adding = [vector for vector in vectors if isinstance(vector, VectorSteering)]
    for vector in adding:
        for layer in vector.layers:
            lm.sites.check(Site(vector.site, layer))
    config = lm.model.config
    config = type(config)(**{**config.to_dict(), "architectures": [type(lm.model).__name__]})
    refuse_early(lm.name or "the model", layout_of(config), adding)


def _reported(
    found: Plan, draft: Draft, lm: LanguageModel | None, vectors: list[Scaled], target: Path
) -> BakeReport:
    """The report of what was written and not compared yet."""
    # Of a model that was not loaded, the one it had when the vectors were made.
    recorded = next((v.fingerprint for v in vectors if v.fingerprint), "")
    return BakeReport(
        found.route,
        target,
        None,
        None,
        rounding=max(draft.rounding.values(), default=0.0),
        dtype=str(draft.dtype).removeprefix("torch."),
        plan=found,
        base_fingerprint=recorded if lm is None else lm.fingerprint,
    )


def _verified(
    report: BakeReport,
    base: Base,
    draft: Draft,
    building: Path,
    vectors: list[Scaled],
    prompts: Sequence[Prompt],
    sliced: bool,
) -> BakeReport:
    report = replace(report, tensors_compared=compare_tensors(base, draft, building))
    size = draft.base.nbytes
    if sliced or not fits_memory(size):
        folders, moved = write_slices(draft, building, vectors)
        try:
            return compare_slices(report, base, folders, moved)
        finally:
            shutil.rmtree(building / ".slices", ignore_errors=True)
    wide = None
    if base.half and fits_memory(2 * size):
        wide = compare_wide(report, base, building, vectors, prompts)
    report = compare_models(report, base, building, vectors, prompts, decide=wide is None)
    return replace(report, float32_difference=wide)
