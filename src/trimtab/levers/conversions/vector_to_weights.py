"""Vector to weights: a bias or a null block, exact after a real reload, or refused by name.

The routes are those of `trimtab.weights`; here every one of them is tried, so that the answer is a
residual of 0 or the reason why there is none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Conversion, together
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Table, number
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.weights.bake import bake, plan

ROUTES = ("bias", "null_block", "convert")


@dataclass(frozen=True)
class Route:
    """One way into the weights.

    Attributes:
        asked: `any`, or the one route that was allowed.
        route: what was done; empty when refused.
        difference: largest logit difference between hook and reloaded checkpoint; None when refused
            or not verified.
        effect: largest change of a logit that the steering makes, for scale.
        equal_text: whether the greedy answers are the same.
        refused: why there is no exact route; empty when there is one.
        advice: the nearest exact alternative.
    """

    asked: str
    route: str
    difference: float | None = None
    effect: float | None = None
    equal_text: bool | None = None
    refused: str = ""
    advice: str = ""


@dataclass(frozen=True)
class InWeights(Conversion):
    """Steerings as weights.

    Attributes:
        lever: what was converted, and is in the weights where there is a route.
        routes: the planner's own choice first, then each route alone.
    """

    lever: VectorSteering | Together
    routes: tuple[Route, ...]
    lost = "logit difference after a reload, over the effect"

    @property
    def exact(self) -> bool:
        """Whether there is an exact route."""
        return not self.routes[0].refused

    @property
    def residual(self) -> float | None:
        """The largest logit difference over the steering's effect; None when refused or not verified."""
        first = self.routes[0]
        if first.difference is None or not first.effect:
            return None
        return first.difference / first.effect

    @property
    def told(self) -> str:
        """The route, or the refusal, in a few words."""
        first = self.routes[0]
        return f"exact: {first.route}" if self.exact else f"no: {first.refused}"

    def figures(self) -> Table:
        rows = tuple(
            (
                r.asked,
                r.route or f"refused: {r.refused}",
                number(r.difference, 6),
                number(r.effect),
                {None: "", True: "yes", False: "no"}[r.equal_text],
            )
            for r in self.routes
        )
        columns = ("route", "done", "logit difference", "effect", "greedy text equal")
        notes = tuple(f"advice: {a}" for a in dict.fromkeys(r.advice for r in self.routes) if a)
        return Table(f"{self.lever.label} to weights", columns, rows, notes)


def vector_to_weights(
    lm: LanguageModel,
    vector: VectorSteering | Sequence[VectorSteering],
    *,
    routes: Sequence[str] = ROUTES,
    verify: bool = True,
) -> InWeights:
    """Bake a steering, or several that would be on together, by the planner's route and by each alone.

    Each checkpoint is reloaded and compared; without `verify` it is only planned, and nothing but the
    planner's temporary copy is written.
    """
    vectors = [vector] if not isinstance(vector, Sequence) else list(vector)
    tried = [_try(lm, vectors, None, verify), *(_try(lm, vectors, r, verify) for r in routes)]
    return InWeights(together(vectors, "vectors"), tuple(tried))


def _try(
    lm: LanguageModel, vectors: list[VectorSteering], route: str | None, verify: bool
) -> Route:
    asked = route or "any"
    try:
        if not verify:
            found = plan(lm, vectors, route)
            found.check()
            return Route(asked, found.route)
        with tempfile.TemporaryDirectory() as folder:
            report = bake(lm, vectors, Path(folder) / "baked", route=route)
    except TrimtabError as refusal:
        reason = refusal.found.removeprefix("no exact route: ")
        return Route(asked, "", refused=reason, advice=refusal.advice)
    return Route(
        asked, report.route, report.max_logit_difference, report.steering_effect, report.equal_text,
    )  # fmt: skip
