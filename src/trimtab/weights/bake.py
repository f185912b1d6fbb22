"""Baking: write the steering into a checkpoint, reload it, and keep it only if it is equal."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

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
from trimtab.weights.disk.base import Model, folder_of, save_model
from trimtab.weights.disk.checkpoint import Checkpoint, open_checkpoint
from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.disk.stream import check_space, write
from trimtab.weights.plan import BakeReport, Plan, prepare, refused_plan
from trimtab.weights.routes.changes import changes_of
from trimtab.weights.slices import write_slices
from trimtab.weights.soft.prompt import bake_prompt
from trimtab.weights.soft.value import PromptReport
from trimtab.weights.verify import (
    Base,
    Verified,
    compare_models,
    compare_slices,
    compare_tensors,
    compare_wide,
    fits_memory,
)

__all__ = ["BakeReport", "bake", "plan"]

Levers = Scaled | Together | Sequence[Scaled]
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Settings:
    """How to bake; the arguments of `bake` that do not say what."""

    verify: bool | str
    prompts: Sequence[Prompt]
    link: bool
    progress: Progress | None


@overload
def bake(
    model: Model, lever: PromptSteering, out: str | os.PathLike[str], **how: Any
) -> PromptReport: ...
@overload
def bake(model: Model, lever: Levers, out: str | os.PathLike[str], **how: Any) -> BakeReport: ...
def bake(
    model: Model, lever: Levers | PromptSteering, out: str | os.PathLike[str], **how: Any
) -> BakeReport | PromptReport:
    """Write a checkpoint that steers itself, from any lever that weights can hold.

    Vectors and low-rank updates become weights (`bake_levers`, which says what can be asked), a soft
    prompt becomes tokens of the vocabulary (`bake_prompt`).

    Args:
        model: a folder, a hub id, "harbor" or a loaded model.
        lever: a vector, a low-rank update, several of these that would be on together, or a soft
            prompt.
        out: folder to create.
        how: the options of `bake_levers` or `bake_prompt`.

    Raises:
        TrimtabError: a prompt in words, which has no place in the weights, and whatever has no exact
            route.
    """
    if not isinstance(lever, PromptSteering):
        return bake_levers(model, lever, out, **how)
    if lever.vectors is None:
        raise _words(lever.label)
    return bake_prompt(model, lever, out, **how)


def bake_levers(
    model: Model,
    lever: Levers,
    out: str | os.PathLike[str],
    *,
    verify: bool | str = True,
    prompts: Sequence[Prompt] = NEUTRAL_PROMPTS[:4],
    route: str | None = None,
    link: bool = True,
    progress: Progress | None = None,
) -> BakeReport:
    """Write a checkpoint of a model that steers itself; the model is left as it is.

    The folder holds weights, config, generation config, tokenizer with its chat template, a model
    card and a record of what was done. It is built beside `out` and renamed there at the end, so
    `out` is complete or absent; what a killed run left is removed by the next one. Given a folder
    or hub id, no tensor is held in memory whole and files that do not change are shared with the
    base by hard links; a loaded model is saved first, as it is now.

    Args:
        model: a folder, a hub id, "harbor" or a loaded model; the one the levers were made for.
        lever: a vector or low-rank update at the strength to bake, or several that would be on
            together.
        out: folder to create; an existing empty one is taken.
        verify: True compares the reloaded whole model, or a slice where it does not fit into
            memory; "slice" always a slice; False only writes.
        prompts: what the reloaded model is compared on.
        route: only `bias`, `null_block` or `convert` for what is added, where there is a choice.
        link: False copies unchanged files, so that nothing is shared with the base's folder.
        progress: called with (bytes done, bytes in all).

    Raises:
        TrimtabError: no exact route (the plan says why, and what is nearest); another model's
            vector; a folder with something in it; too little space; a checkpoint that does not
            reload as what it was meant to be.
    """
    vectors = _listed(lever)
    settings = Settings(verify, prompts, link, progress)
    target = Path(out)
    drafted: tuple[Plan, Draft] | None = None
    if isinstance(model, LanguageModel):
        _check_early(model, vectors)
    else:
        drafted = _drafted(folder_of(model), vectors, route)
    with staged(target) as building:
        if isinstance(model, LanguageModel):
            save_model(model, building / ".base")
            place = (building / ".base", model.name or "a model without a name")
            drafted = _drafted(place, vectors, route)
        assert drafted is not None
        found, draft = drafted
        base = draft.base
        check_space(draft, target, link)
        write(draft, building, link, progress)
        lm = model if isinstance(model, LanguageModel) else None
        routed = draft.layout.mlp != "mlp."
        source = Base(base.folder, found.model, lm, _dtype(lm, base), _attention(lm), routed)
        report = _report(source, vectors, found, draft, building, target, settings)
        card = model_card(found, vectors, report)
        (building / "README.md").write_text(card, encoding="utf-8")
        write_json(building / RECORD, record_of(found, vectors, report, base.folder))
        shutil.rmtree(building / ".base", ignore_errors=True)
    return report


def plan(model: Model, lever: Levers, route: str | None = None) -> Plan:
    """Say by which exact route each steering would become weights, at what cost, or why it cannot.

    Nothing is loaded and nothing is written (a model in memory is saved to a temporary folder).

    Args:
        model: as for `bake`.
        lever: one steering or several.
        route: as for `bake`.

    Raises:
        TrimtabError: no model, or an architecture that has no routes at all.
    """
    vectors = _listed(lever)
    if not isinstance(model, LanguageModel):
        return _load_plan(folder_of(model), vectors, route)
    for each in vectors:
        each.check(model)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        found = prepare(open_checkpoint(folder), vectors, route)[0]
    return replace(found, model=_public(model.name or "a model without a name"))


def _drafted(
    place: tuple[Path, str], vectors: list[Scaled], route: str | None
) -> tuple[Plan, Draft]:
    """Open a checkpoint and draft the result, or refuse."""
    folder, name = place
    found, draft = prepare(open_checkpoint(folder), vectors, route)
    found = replace(found, model=_public(name))
    found.check()
    assert draft is not None  # check() refused where there is none
    return found, draft


def _load_plan(place: tuple[Path, str], vectors: list[Scaled], route: str | None) -> Plan:
    folder, name = place
    return replace(prepare(open_checkpoint(folder), vectors, route)[0], model=_public(name))


def _listed(lever: Levers) -> list[Scaled]:
    lever = lever.vectors if isinstance(lever, Together) else lever
    levers = [lever] if isinstance(lever, Scaled) else list(lever)
    if not levers or not all(isinstance(each, Scaled) for each in levers):
        raise TrimtabError(
            asked="to bake a steering",
            found=f"{[type(each).__name__ for each in levers] or 'nothing'}",
            advice="give vectors or low-rank updates; a soft prompt is baked alone, and a prompt in "
            "words has no place in the weights",
        )
    return levers


def _words(label: str) -> TrimtabError:
    return TrimtabError(
        asked=f"to bake {label}",
        found="a prompt in words, which has no place in the weights",
        advice="bake a vector, a low-rank update or a soft prompt; words go into the prompt",
    )


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
    layout = layout_of(config)
    changes = changes_of(adding, layout.parallel)
    if changes.refused:
        refused_plan(lm.name or "the model", layout, adding, changes).check()


def _public(name: str) -> str:
    """A name for others to read: folders of the maker's machine are nobody's business."""
    return Path(name).name if name.count("/") > 1 or name.startswith((".", "~")) else name


def _dtype(lm: LanguageModel | None, base: Checkpoint) -> torch.dtype:
    return base.dtype if lm is None else lm.model.dtype


def _attention(lm: LanguageModel | None) -> str | None:
    return None if lm is None else lm.model.config._attn_implementation


def _report(
    base: Base,
    vectors: list[Scaled],
    found: Plan,
    draft: Draft,
    building: Path,
    target: Path,
    settings: Settings,
) -> BakeReport:
    rounding = max(draft.rounding.values(), default=0.0)
    dtype = str(draft.dtype).removeprefix("torch.")
    # Of a model that was not loaded, the one it had when the vectors were made.
    recorded = next((v.fingerprint for v in vectors if v.fingerprint), "")
    empty = BakeReport(
        found.route,
        target,
        None,
        None,
        rounding=rounding,
        dtype=dtype,
        plan=found,
        base_fingerprint=base.lm.fingerprint if base.lm is not None else recorded,
    )
    if not settings.verify:
        return empty
    compared = compare_tensors(draft, building, target)
    seen = _verified(base, vectors, draft, building, target, settings)
    return replace(
        empty,
        max_logit_difference=seen.difference,
        equal_text=seen.equal_text,
        tolerance=seen.allowed,
        steering_effect=seen.effect,
        verified=seen.how,
        float32_difference=seen.float32_difference,
        tensors_compared=compared,
        base_fingerprint=seen.fingerprint or empty.base_fingerprint,
    )


def _verified(
    base: Base,
    vectors: list[Scaled],
    draft: Draft,
    building: Path,
    target: Path,
    settings: Settings,
) -> Verified:
    size = sum(fact.nbytes for fact in draft.base.tensors.values())
    if settings.verify == "slice" or not fits_memory(size):
        folders, moved = write_slices(draft, building, vectors)
        try:
            return compare_slices(base, folders, moved, target)
        finally:
            shutil.rmtree(building / ".slices", ignore_errors=True)
    wide = None
    if base.dtype in _HALF and fits_memory(2 * size):
        wide = compare_wide(base, building, vectors, settings.prompts, target)
    prompts = settings.prompts
    seen = compare_models(base, building, vectors, prompts, target, decide=wide is None)
    return replace(seen, float32_difference=wide)
