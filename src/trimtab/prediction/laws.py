"""The laws of one vector's strength: prediction, its check over depth, calibration, recovery."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.readout import readout_tokens
from trimtab.models.model import LanguageModel
from trimtab.prediction.calibration import Calibration, calibration
from trimtab.prediction.law_check import LawCheck, check_laws
from trimtab.prediction.predict import StrengthPrediction, predict_strength
from trimtab.prediction.recovery import Recovery, recovery
from trimtab.results import Progress, stepper
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class LawsReport(Printable):
    """What was predicted and measured for one vector, on the test split.

    Attributes:
        prediction: the laws from one derivative.
        check: prediction against measurement at the vector's own layers.
        depth: the same for every single layer that has a direction, by rising layer.
        calibration: the protocol of norm-calibrated strength.
        recovery: the stream and the answers after very large pushes.
    """

    behavior: str
    model: str
    fingerprint: str
    prediction: StrengthPrediction
    check: LawCheck
    depth: tuple[LawCheck, ...]
    calibration: Calibration
    recovery: Recovery

    def table(self) -> Table:
        budgets = sorted({b.nats for b in self.check.budgets})
        rows = tuple(
            (
                ", ".join(map(str, each.layers)),
                *(
                    number(each.budget(name, nats).ratio)
                    for name in ("tilt", "norm")
                    for nats in budgets
                ),
                number(each.exponent),
                number(each.peaks),
                "–" if each.collapse_right is None else number(each.collapse_right),
            )
            for each in (*self.depth, self.check)
        )
        named = [f"{name} {nats:g}" for name in ("tilt", "norm") for nats in budgets]
        columns = ("layers", *named, "exponent", "peak order", "collapse")
        notes = ("measured over predicted KL at budgets in nats, median over prompts: 1 is right",)
        return Table(f"{self.behavior}: where the laws hold", columns, rows, notes)


def laws(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    direction: Side = "toward",
    max_prompts: int | None = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LawsReport:
    """Predict, measure and compare, on the test split.

    Args:
        lm: the unsteered model, best in float32.
        behavior: split here; the test prompts are used.
        vector: whose strength it is about.
        direction: `toward` or `away`; the calibration takes both.
        max_prompts: cap per side; None for all.
        max_new_tokens: length of answers.
        seed: of the split and the intervals.
        progress: called with (steps done, steps in all).
    """
    sign = sign_of(direction)
    test = behavior.split(seed).named("test")
    known = Unsteered(lm, max_new_tokens)
    evaluator = Evaluator(
        lm, test, max_new_tokens=max_new_tokens, max_prompts=max_prompts, unsteered=known
    )
    prompts = evaluator.prompts(evaluator.scored(sign))
    words = None if behavior.readout is None else readout_tokens(lm, behavior)
    wanted = () if words is None else (words.toward if sign > 0 else words.away)
    layers = sorted(vector.directions)
    step = stepper(progress, len(layers) + 4)
    predicted = predict_strength(
        lm, test, vector, direction=direction, max_prompts=max_prompts, max_new_tokens=max_new_tokens,
        unsteered=known,
    )  # fmt: skip
    step()
    checked = check_laws(lm, vector, prompts, sign=sign, wanted=wanted)
    step()
    depth: list[LawCheck] = []
    for layer in layers:
        alone = vector.select(layers=[layer])
        depth.append(check_laws(lm, alone, prompts, sign=sign, wanted=wanted, points=2))
        step()
    calibrated = calibration(
        lm, test, vector, max_prompts=max_prompts, max_new_tokens=max_new_tokens, seed=seed,
        unsteered=known,
    )  # fmt: skip
    step()
    returned = recovery(
        lm, vector.at(sign * abs(vector.strength or 1.0)), prompts,
        evaluator=evaluator, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    step()
    return LawsReport(
        behavior.name,
        lm.name,
        lm.fingerprint,
        predicted,
        checked,
        tuple(depth),
        calibrated,
        returned,
    )
