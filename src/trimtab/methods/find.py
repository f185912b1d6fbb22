"""Runs a method for a behavior: a vector that is calibrated and points toward it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.methods.registry import METHODS, Position, Task
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.passes.engine import Engine
from trimtab.results import Progress
from trimtab.steering.layers import default_layers
from trimtab.steering.norms import calibrate
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

# A direction is added where it was read, unless the caller says otherwise; else at the last token.
ADDED_WHERE_READ = {"post_instruction": "post_instruction", "answer": "generated", "judged_answer": "generated"}


def find(
    lm: LanguageModel,
    behavior: Behavior,
    method: str = "mean_difference",
    *,
    layers: Sequence[int] | int | None = None,
    scope: str | Scope | None = None,
    site: str = "resid_post",
    position: Position | None = None,
    split: str | None = "train",
    seed: int = 0,
    progress: Progress | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> VectorSteering:
    """Find the steering vector of a behavior: calibrated, pointing toward it, at strength m = 1.

    Directions are found at every layer; `layers` chooses those that are steered. At strength m,
    m mu_l / sqrt(d_model) is added along the unit direction of layer l (steering/norms.py).

    Args:
        lm: the unsteered model.
        behavior: what is to change.
        method: one of `METHODS` or an alias; docs/methods has a page on each.
        layers: layers to steer; when absent 40 % to 90 % of the depth, or the method's one layer.
        scope: which tokens are steered; where it was read when absent.
        site: kind of site that is read and written.
        position: where prompts are read: `last` prompt token; `post_instruction`, the mean over the
            template's tokens after the user's text; `answer`, the mean over the answer;
            `judged_answer`, the same, but both answers read after the away prompt, and of the
            toward prompts' own answers only those that the judge calls toward; k, the one of the
            last k prompt positions that tells the sides apart best; -k, exactly the k-th from the
            end.
        split: of the behavior to find it from; None for all of it (then nothing is left to score).
        seed: of the split, and of whatever is random in the method.
        progress: called with steps done and steps in all.
        engine: does a method's independent parts; this process by default.
        **options: of the method, with the defaults of its signature.

    Raises:
        TrimtabError: an unknown method, option, split, site or layer; sides that cannot be told
            apart; see also the method's page.
    """
    chosen = METHODS[method]
    chosen.check("method", options, chosen.name)
    if not isinstance(behavior, Behavior):
        raise TrimtabError(
            f"a vector for {behavior!r}",
            f"a {type(behavior).__name__} instead of a behavior",
            "load it first: trimtab.behavior(name or path), or make a trimtab.Behavior",
        )
    if engine is not None and engine.elsewhere and not chosen.parts:
        spread = ", ".join(name for name in METHODS if METHODS[name].parts)
        raise TrimtabError(
            f"{chosen.name} on workers of {engine.name}",
            "one computation, which has no independent parts",
            f"use {spread}, find several vectors at once, or leave the engine away",
        )
    part = behavior if split is None else behavior.split(seed).named(split)
    where = chosen.read_at if position is None else position
    read_there = chosen.added_at if position is None else ADDED_WHERE_READ.get(str(where), "last")
    added = scope or read_there
    active = _active(lm, layers)
    lm.sites.check(Site(site, 0))
    task = Task(
        lm=lm,
        behavior=part,
        site=site,
        layers=(0,) if site == "embed" else tuple(range(lm.n_layers)),
        active=active,
        position=where,
        scope=Scope.parse(added),
        norms=calibrate(lm, site=site),
        seed=seed,
        progress=progress,
        engine=engine,
    )
    found = chosen.function(task, **options)
    units = {layer: _unit(vector) for layer, vector in found.vectors.items()}
    return VectorSteering(
        directions=units,
        layers=_steered(task, units, chosen.name),
        scales={layer: task.norms.scales[layer] for layer in units},
        strength=found.strength,
        site=site,
        scope=task.scope,
        norms={layer: task.norms.mean[layer] for layer in units},
        class_gaps=dict(found.class_gaps),
        spreads=dict(found.spreads),
        provenance={
            "method": chosen.name,
            "behavior": behavior.name,
            "data_hash": behavior.data_hash,
            "split": split,
            "seed": seed,
            "examples": {"toward": len(part.toward), "away": len(part.away)},
            "read_at": found.read_at,
            "added_at": str(task.scope),
            "options": {k: _plain(v) for k, v in {**chosen.options, **options}.items()},
            "details": dict(found.details),
        },
        fingerprint=lm.fingerprint,
        model_name=lm.name or "",
        n_layers=lm.n_layers,
        d_model=lm.d_model,
    )


def _active(lm: LanguageModel, layers: Sequence[int] | int | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    asked = [layers] if isinstance(layers, int) else list(layers)
    unknown = [x for x in asked if isinstance(x, bool) or x not in range(lm.n_layers)]
    if unknown or not asked:
        raise TrimtabError(
            f"a vector for the layers {asked}",
            f"a model with the layers 0 to {lm.n_layers - 1}",
            "name at least one layer, counted from 0",
        )
    return tuple(sorted(set(asked)))


def _steered(task: Task, units: Mapping[int, Tensor], method: str) -> tuple[int, ...]:
    """Return the active layers; only one that nobody named may be without a direction."""
    wanted = task.active or tuple(x for x in default_layers(task.lm.n_layers) if x in units)
    wanted = wanted or tuple(units)
    missing = [layer for layer in wanted if layer not in units]
    if missing or not wanted:
        raise TrimtabError(
            f"a {method} vector of {task.behavior.name!r}, layers {missing or 'of the model'}",
            f"sides that cannot be told apart there (read at {task.position})",
            "read elsewhere (position=), at deeper layers, or give prompts that differ more",
        )
    return wanted


def _unit(vector: Tensor) -> Tensor:
    vector = vector.detach().to("cpu", torch.float64)
    return (vector / vector.norm()).to(torch.float32)


def _plain(value: Any) -> Any:
    """Return an option as JSON can hold it; functions by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return getattr(value, "__name__", type(value).__name__)
