"""What a method of finding a vector is given and returns, and the methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.results import Progress
from trimtab.results.registry import Named, Registry
from trimtab.steering.norms import Norms
from trimtab.steering.scope import Scope

Position: TypeAlias = "str | int"


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
class Method(Named):
    """A registered method of `find`: a function `(task, *, option=default, ...) -> Found`.

    Attributes:
        read_at: the default position that is read.
        added_at: the default scope.
        parts: whether the function hands independent parts to the task's engine.
    """

    read_at: Position = "last"
    added_at: str = "last"
    parts: bool = False


METHODS: Registry[Method] = Registry("method", make=Method, group="trimtab.methods")
register = METHODS.register
