"""Registers the ways to find a vector by name, and runs one for a behavior."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.passes.engine import Engine
from trimtab.steering.layers import default_layers
from trimtab.steering.norms import Norms, calibrate
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

Progress: TypeAlias = Callable[[int, int], None]  # done, in all
Position: TypeAlias = "str | int"

# A direction is added where it was read, unless the caller says otherwise.
ADDED_WHERE_READ = {
    "last": "last",
    "post_instruction": "post_instruction",
    "answer": "generated",
}


@dataclass(frozen=True, eq=False)
class Task:
    """What a method is given.

    Attributes:
        lm: the unsteered model.
        behavior: the prompts to find it from (a split).
        site: kind of site that is read and written.
        layers: every layer that has the site.
        active: the layers that the caller wants steered, or None.
        position: where prompts are read.
        scope: which tokens will be steered.
        norms: the norm profile of the site, the unit of strength.
        seed: of whatever is random.
        progress: called with steps done and steps in all.
        engine: does what is independent; this process where it is None.
    """

    lm: LanguageModel
    behavior: Behavior
    site: str
    layers: tuple[int, ...]
    active: tuple[int, ...] | None
    position: Position
    scope: Scope
    norms: Norms
    seed: int
    progress: Progress | None
    engine: Engine | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What a method returns.

    Attributes:
        vectors: layer -> vector `[d_model]` of any length that points toward the behavior. A layer
            where the sides cannot be told apart is left out.
        read_at: where it was read, in words.
        class_gaps: layer -> (mean(toward) - mean(away)) along the unit direction.
        spreads: layer -> standard deviation of all projections on the unit direction.
        strength: the strength m it is meant to be used at.
        details: JSON-able facts for the provenance.
    """

    vectors: Mapping[int, Tensor]
    read_at: str
    class_gaps: Mapping[int, float]
    spreads: Mapping[int, float]
    strength: float = 1.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method: its function `(task, **options)` and where it reads and is added.

    `parts` says whether it has independent parts, which engines can spread.
    """

    name: str
    function: Callable[..., Found]
    read_at: Position
    added_at: str
    parts: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {}


def register(
    name: str, *, read_at: Position = "last", added_at: str = "last", parts: bool = False
) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Register a function `(task, *, option=default, ...) -> Found` as a method of `find`.

    Args:
        name: what users type.
        read_at: the default position that is read.
        added_at: the default scope.
        parts: whether the function hands independent parts to the task's engine.
    """

    def add(function: Callable[..., Found]) -> Callable[..., Found]:
        METHODS[name] = Method(name, function, read_at, added_at, parts)
        return function

    return add


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
        method: one of `METHODS`; docs/methods has a page on each.
        layers: layers to steer; when absent 40 % to 90 % of the depth, or the method's one layer.
        scope: which tokens are steered; where it was read when absent.
        site: kind of site that is read and written.
        position: where prompts are read: `last` prompt token; `post_instruction`, the mean over the
            template's tokens after the user's text; `answer`, the mean over the answer; k, the one
            of the last k prompt positions that tells the sides apart best; -k, exactly the k-th
            from the end.
        split: of the behavior to find it from; None for all of it (then nothing is left to score).
        seed: of the split, and of whatever is random in the method.
        progress: called with steps done and steps in all.
        engine: does a method's independent parts; this process by default.
        **options: of the method, with the defaults of its signature.

    Raises:
        TrimtabError: an unknown method, option, split, site or layer; sides that cannot be told
            apart; see also the method's page.
    """
    chosen = _method(method, options)
    if not isinstance(behavior, Behavior):
        raise TrimtabError(
            f"a vector for {behavior!r}",
            f"a {type(behavior).__name__} instead of a behavior",
            "load it first: trimtab.behavior(name or path), or make a trimtab.Behavior",
        )
    if engine is not None and engine.elsewhere and not chosen.parts:
        spread = ", ".join(sorted(name for name, each in METHODS.items() if each.parts))
        raise TrimtabError(
            f"{method} on workers of {engine.name}",
            "one computation, which has no independent parts",
            f"use {spread}, find several vectors at once, or leave the engine away",
        )
    part = behavior if split is None else behavior.split(seed).named(split)
    where = chosen.read_at if position is None else position
    added = scope or (chosen.added_at if position is None else _added(where))
    task = Task(
        lm=lm,
        behavior=part,
        site=site,
        layers=(0,) if site == "embed" else tuple(range(lm.n_layers)),
        active=_active(lm, layers),
        position=where,
        scope=Scope.parse(added),
        norms=calibrate(lm, site=_site(lm, site)),
        seed=seed,
        progress=progress,
        engine=engine,
    )
    found = chosen.function(task, **options)
    units = {layer: _unit(vector) for layer, vector in found.vectors.items()}
    return VectorSteering(
        directions=units,
        layers=_steered(task, units, method),
        scales={layer: task.norms.scales[layer] for layer in units},
        strength=found.strength,
        site=site,
        scope=task.scope,
        norms={layer: task.norms.mean[layer] for layer in units},
        class_gaps=dict(found.class_gaps),
        spreads=dict(found.spreads),
        provenance={
            "method": method,
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


def _method(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise TrimtabError(
            f"the method {name!r}", "no such method", f"choose one of: {', '.join(sorted(METHODS))}"
        )
    method = METHODS[name]
    unknown = [option for option in options if option not in method.options]
    if unknown:
        known = ", ".join(method.options) or "none"
        raise TrimtabError(
            f"the option {unknown[0]!r} of the method {name!r}",
            f"the options {known}",
            f"see docs/methods/{name}.md",
        )
    return method


def _added(position: Position) -> str:
    return ADDED_WHERE_READ.get(position, "last") if isinstance(position, str) else "last"


def _site(lm: LanguageModel, site: str) -> str:
    lm.sites.check(Site(site, 0))
    return site


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
