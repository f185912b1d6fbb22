"""The calibration report: norms by depth, and what norm-calibrated strengths do on a model.

The protocol of norm-calibrated strength: alpha_l = m mu_l / sqrt(d_model) at single layers over the
depth and at the default range together, broadcast (`all`) and `last`, both signs, |m| up to 3. The
cliff is the first |m| at which mean coherence falls under one half; it is searched beyond the
protocol's range, since m is a convention and not a law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.summary import mean
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import decisions
from trimtab.prediction.predict import arrival
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.layers import default_layers
from trimtab.steering.norms import calibrate
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import SweepRow, curve, largest_within

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
SCOPES = ("all", "last")
COLLAPSED = 0.5  # coherence
STEP = 2 ** (1 / 6) + 1e-9  # a sixth of a doubling, how finely the cliff is located
FURTHEST = 128.0  # |m| where the search for the cliff ends
NEAREST = 1 / 128  # and below which it is not looked for


@dataclass(frozen=True)
class Place:
    """One layer set, scope and side.

    Attributes:
        layers: steered together.
        scope: steered tokens.
        sign: side.
        rows: the protocol's strengths.
        cliff: first |m| with coherence under one half; None when there is none up to `FURTHEST`, 0
            when even an all but unsteered model is under it.
        cliff_push: there, the push as it arrives before the final norm to first order,
            |sum_l J alpha_l c_l| over the stream's norm; None without a cliff.
    """

    layers: tuple[int, ...]
    scope: str
    sign: int
    rows: tuple[SweepRow, ...]
    cliff: float | None
    cliff_push: float | None

    def at(self, magnitude: float) -> SweepRow:
        """Return the row of a strength |m|."""
        return next(row for row in self.rows if abs(row.strength) == magnitude)


@dataclass(frozen=True)
class Calibration(Printable):
    """Everything measured.

    Attributes:
        norms: layer -> mean norm of the stream.
        grows: whether the norm rises at every layer.
        places: layer sets by scope by side.
    """

    behavior: str
    label: str
    norms: dict[int, float]
    grows: bool
    places: tuple[Place, ...]

    def table(self) -> Table:
        rows = tuple(
            (
                ", ".join(map(str, place.layers)),
                place.scope,
                "toward" if place.sign > 0 else "away",
                *(
                    f"{with_interval(row.score, row.low, row.high)} / {number(row.coherence)}"
                    for row in (place.at(1.0), place.at(3.0))
                ),
                "none" if place.cliff is None else number(place.cliff),
                number(place.cliff_push),
            )
            for place in self.places
        )
        columns = ("layers", "scope", "side", "|m| = 1: score / coherence", "|m| = 3", "cliff at |m|",
                   "push there")  # fmt: skip
        profile = ", ".join(f"{layer}: {number(mu, 1)}" for layer, mu in self.norms.items())
        grows = "rise at every layer" if self.grows else "do not rise at every layer"
        return Table(
            f"{self.behavior}: {self.label}",
            columns,
            rows,
            (f"norms by layer {profile}: they {grows}",),
        )


def calibration(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    layers: Sequence[Sequence[int]] | None = None,
    scopes: Sequence[str] = SCOPES,
    signs: Sequence[int] = (1, -1),
    strengths: Sequence[float] = STRENGTHS,
    max_new_tokens: int = 40,
    max_prompts: int | None = 12,
    seed: int = 0,
    unsteered: Unsteered | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the protocol on a split, for a calibrated vector (its scales are mu_l / sqrt(d_model)).

    Without `layers`, up to four single layers over the depth are taken, and the default range
    together. Strengths are |m|; 1 and 3 are in the table, so they are always measured.
    """
    profile = calibrate(lm).mean
    if layers is None:
        known = sorted(vector.directions)
        singles = [(k,) for k in known[min(1, len(known) - 1) :: max(1, lm.n_layers // 4)]]
        band = tuple(k for k in default_layers(lm.n_layers) if k in vector.directions)
        layers = [*singles, *([band] if len(band) > 1 else [])]
    evaluator = Evaluator(
        lm, behavior, max_new_tokens=max_new_tokens, max_prompts=max_prompts, unsteered=unsteered
    )
    magnitudes = sorted({abs(float(m)) for m in strengths} | {1.0, 3.0})
    todo = [
        (tuple(at), scope, 1 if sign > 0 else -1)
        for at in layers
        for scope in scopes
        for sign in signs
    ]
    places: list[Place] = []
    for at, scope, side in todo:
        placed = vector.select(layers=at, scope=scope)
        rows = curve(evaluator, placed, [side * m for m in magnitudes], side, seed=seed)
        edge = cliff(evaluator, placed, side, rows)
        push = None
        if edge is not None:
            push = edge * arrival(decisions(lm, placed, evaluator.prompts(evaluator.scored(side))))
        places.append(Place(placed.layers, str(placed.scope), side, tuple(rows), edge, push))
        if progress is not None:
            progress(len(places), len(todo))
    ordered = [profile[k] for k in sorted(profile)]
    grows = all(b > a for a, b in zip(ordered, ordered[1:], strict=False))
    return Calibration(behavior.name, vector.label, profile, grows, tuple(places))


def cliff(
    evaluator: Evaluator, vector: VectorSteering, side: int, rows: Sequence[SweepRow] = ()
) -> float | None:
    """Return the first |m| with mean coherence under one half, to 12 %; None up to `FURTHEST`.

    Known rows are used first. 0 where the text is no better at `NEAREST`.
    """

    def broken(magnitudes: Sequence[float]) -> list[float]:
        answered = evaluator.run_many(vector, [side * m for m in magnitudes], side)
        return [-mean(result.coherences) for result in answered]

    within, beyond = largest_within(
        broken,
        -COLLAPSED,
        smallest=NEAREST,
        largest=FURTHEST,
        known={abs(row.strength): -row.coherence for row in rows if row.strength},
        width=STEP,
        points=5,
    )
    if beyond == math.inf:
        return None
    return beyond if within else 0.0
