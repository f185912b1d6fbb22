"""Several vectors at once: of several behaviors, or of several layers, none of which needs another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import judge_for
from trimtab.methods.find import find
from trimtab.methods.registry import METHODS
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.results import Progress
from trimtab.results.journal import Notes
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class Wanted:
    """One vector that is to be found; the attributes are those of `find`.

    Where a method can use a judge, it gets that of the behavior.
    """

    behavior: Behavior
    method: str = "mean_difference"
    layers: tuple[int, ...] | None = None
    scope: str | None = None
    position: str | int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The behavior's name, and the layers where they were named."""
        layers = "" if self.layers is None else "-" + "-".join(map(str, self.layers))
        return f"{self.behavior.name}{layers}"


def find_each(
    lm: LanguageModel,
    wanted: Sequence[Wanted],
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[VectorSteering]:
    """Find vectors that do not depend on each other; `progress` counts vectors.

    Raises:
        TrimtabError: two of the same name, or what `find` raises.
    """
    names = [each.name for each in wanted]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice or not wanted:
        raise TrimtabError(
            asked=f"the vectors {', '.join(names) or '(none)'}",
            found=f"{twice[0]} twice" if twice else "nothing to find",
            advice="name each behavior and layer once",
        )
    count = iter(range(1, len(wanted) + 1))

    def done(number: int, vector: VectorSteering) -> None:
        if progress is not None:
            progress(next(count), len(wanted))

    units = [partial(_find, each) for each in wanted]
    return (engine or Engine(lm)).map(Job(lm, _itself), units, done=done)


def find_one(
    lm: LanguageModel,
    wanted: Wanted,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> VectorSteering:
    """Find one of them; see `find`."""
    options: dict[str, Any] = {}
    if wanted.position is not None:
        options["position"] = wanted.position
    if "judge" in METHODS[wanted.method].options and wanted.behavior.judge is not None:
        options["judge"] = judge_for(wanted.behavior)  # wanted answers must show the behavior
    return find(
        lm,
        wanted.behavior,
        wanted.method,
        layers=wanted.layers,
        scope=wanted.scope,
        seed=wanted.seed,
        progress=progress,
        engine=engine,
        **options,
    )


def _find(wanted: Wanted, lm: LanguageModel, notes: Notes) -> VectorSteering:
    return find_one(lm, wanted)


def _itself(lm: LanguageModel) -> LanguageModel:
    return lm
