"""Tune: layers, scope and strength of a vector under a budget of damage, or a refusal with the curve.

1. Screen every place to steer with one derivative and a few strengths on a few prompts (screen.py),
   and read a handful of answers at the best of them.
2. Refine the strength at which measured p95 damage meets the budget, for the most promising.
3. Answer prompts at that strength and below it; confirm the best cells on the validation split.
4. Measure the winner's curve; take the weakest strength on it that does as well; read the window; on
   the test split measure the effect beside random directions.

A cell passes when its score beats the unsteered model's on the same prompts (on the whole split by
more than chance: the paired interval excludes 0), its coherence reaches the floor and its damage keeps
the budget. When none passes, or the gain does not hold on the test split, `NoStrengthPasses` carries
what was tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.spread import run_each
from trimtab.evaluation.summary import Summary, alpha_text, mean, raw_alphas, summary
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.passes.engine import Engine
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.vector import VectorSteering
from trimtab.strength.adaptive import AdaptiveResult, common_goal, measure_adaptive
from trimtab.strength.core import COLUMNS, Bounds, SweepRow, span
from trimtab.strength.screen import Candidate
from trimtab.strength.search import Search
from trimtab.strength.sweep import Tried

NULLS = 2


@dataclass(frozen=True, kw_only=True)
class TuneReport(Summary, Printable):
    """What was chosen and why; the figures of a `Summary` are those of the test split, without samples.

    Attributes:
        layers: chosen layers.
        scope: chosen scope.
        strength: chosen m.
        alpha: layer -> raw alpha.
        window: (lowest, highest) m of the curve around the chosen one that reaches the target, the
            floor and the budgets; None where the target is not reached.
        baseline: the unsteered model's score; `gain` is the paired difference.
        null: mean score of random directions of the same size; `null_damage_p95` their damage.
        validation: the chosen cell where it was chosen.
        curve: measured against strength on the validation split.
        damage_coherence: rank correlation of p95 damage and coherence over all cells answered; -1
            means that damage tells exactly when the text will suffer.
        candidates: every place looked at, the best first.
        tried: every cell answered.
        adaptive: a strength for each prompt; None where it was not asked for.
        model_calls: see `Calls`; workers count for the validation split alone, without what they
            build for themselves. `seconds` on the clock.
    """

    behavior: str
    data_hash: str
    model: str
    fingerprint: str
    method: str
    budget: float
    spill_budget: float | None
    coherence_floor: float
    target: float
    seed: int
    layers: tuple[int, ...]
    scope: str
    strength: float
    alpha: dict[int, float]
    window: tuple[float, float] | None
    baseline: float
    gain: float
    gain_low: float
    gain_high: float
    null: float
    null_damage_p95: float
    validation: SweepRow
    curve: tuple[SweepRow, ...]
    damage_coherence: float
    candidates: tuple[Candidate, ...]
    tried: tuple[Tried, ...]
    adaptive: AdaptiveResult | None
    model_calls: int
    seconds: float

    def table(self) -> Table:
        chosen = f"layers {', '.join(map(str, self.layers))}, scope {self.scope}"
        window = "no window" if self.window is None else f"window {span(self.window)}"
        notes = [
            f"chosen: {chosen}, m = {self.strength:+.3g}, alpha {alpha_text(self.alpha)} ({window})",
            f"test split: score {with_interval(self.score, self.low, self.high)} of {self.n}, "
            f"unsteered {number(self.baseline)}, random control {number(self.null)}, "
            f"coherence {number(self.coherence)}",
            f"damage (on-target KL) {number(self.damage, 3)} (p95 {number(self.damage_p95, 3)} of "
            f"{self.budget:g} allowed), spill (off-target KL) {number(self.spill, 3)}, nats per token",
            f"damage against coherence over {len(self.tried)} cells: rank correlation "
            f"{number(self.damage_coherence)}",
        ]
        if self.adaptive is not None:
            a = self.adaptive
            notes.append(
                f"adaptive, mean m = {number(a.mean)}: score {with_interval(a.score, a.low, a.high)}"
                f", coherence {number(a.coherence)}, damage {number(a.damage, 3)}"
            )
        notes.append(f"{self.model_calls} model calls, {self.seconds:.0f} s")
        side = "toward" if self.sign > 0 else "away"
        rows = tuple(row.cells() for row in self.curve)
        return Table(f"{self.behavior}, {side}: validation curve", COLUMNS, rows, tuple(notes))


@dataclass(frozen=True, eq=False)
class Tuned(VectorSteering):
    """The vector at its chosen layers, scope and strength; `report` says why.

    It is a `VectorSteering` in every use; put at another strength it is a plain one again.
    """

    report: TuneReport = field(kw_only=True)

    def at(self, strength: float) -> VectorSteering:
        """Return the plain vector at another strength."""
        return replace(_plain(self), strength=strength)

    def select(self, *args: Any, **changes: Any) -> VectorSteering:
        """Return the plain vector used elsewhere or otherwise."""
        return _plain(self).select(*args, **changes)

    def table(self) -> Table:
        return self.report.table()

    def to_dict(self) -> dict[str, object]:
        return self.report.to_dict()


def tune(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    budget: float = 0.5,
    *,
    direction: Side = "toward",
    spill_budget: float | None = None,
    coherence_floor: float = 0.9,
    target: float = 0.9,
    layers: Sequence[Sequence[int]] | None = None,
    scope: str | Sequence[str] | None = None,
    adaptive: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_prompts: int | None = MAX_PROMPTS,
    seed: int = 0,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Tuned:
    """Choose layers, scope and strength for the highest score within a budget of damage.

    Args:
        lm: the unsteered model.
        behavior: split here; chosen on validation prompts, reported on test prompts.
        vector: its directions are used; `add`, `ablate` and `affine` all have a strength.
        budget: greatest p95 damage in nats per token.
        direction: `toward` or `away`.
        spill_budget: greatest p95 spill, None for no bound.
        coherence_floor: least mean coherence.
        target: score that the window has to reach.
        layers: layer sets to try; by default the vector's own, every single layer that has a
            direction, and the default range of depth.
        scope: what to try, one or several; by default the vector's own, all, last and post_instruction.
        adaptive: also measure a strength for each prompt, from 0 to the window's far end.
        max_new_tokens: length of answers.
        max_prompts: cap per side and split; None for all.
        seed: of the split, the nulls and the intervals.
        progress: called with (steps done, steps in all).
        engine: does places, cells and nulls; this process by default.

    Raises:
        NoStrengthPasses: with everything tried, when nothing passes.
        TrimtabError: a budget that is not positive, a budget of spill without neutral prompts, or an
            unusable behavior.
    """
    spilled = 1.0 if spill_budget is None else spill_budget
    shares = 0 < target <= 1 and 0 <= coherence_floor <= 1
    if not (0 < budget < math.inf and 0 < spilled < math.inf and shares):
        raise TrimtabError(
            asked=f"to tune within {budget} nats (spill {spill_budget}) to a score of {target} at a "
            f"coherence of {coherence_floor}",
            found="a budget that is not above 0, or a share outside (0, 1]",
            advice="give nats per token such as 0.5 and shares such as 0.9",
        )
    started = time.monotonic()
    splits = behavior.split(seed)
    if spill_budget is not None and not splits.validation.neutral:
        raise TrimtabError(
            asked=f"to tune within {spill_budget} nats of spill",
            found="no neutral prompt in the validation split, so spill is not measured",
            advice="give the behavior at least three neutral prompts, or no spill_budget",
        )
    if engine is not None:
        nulls = [random_null(vector, each) for each in null_seeds(seed, NULLS)]
        engine.expect([vector, *nulls])
    with counting(lm) as calls:
        search = Search(
            lm, splits.named("validation"), vector,
            Bounds(budget, coherence_floor, target, spill_budget), sign_of(direction),
            max_new_tokens, max_prompts, seed, progress, engine,
        )  # fmt: skip
        chosen = search.choose(layers, [scope] if isinstance(scope, str) else scope)
        curve = search.curve(chosen)
        chosen = search.gentler(chosen, curve)
        window = search.window(curve)
        test = Evaluator(
            lm, splits.named("test"), max_new_tokens=max_new_tokens, max_prompts=max_prompts,
            unsteered=search.full.known,
        )  # fmt: skip
        random = [random_null(chosen, each) for each in null_seeds(seed, NULLS)]
        levers = [(lever, search.side) for lever in (chosen, None, *random)]
        result, base, *nulls = run_each(test, levers)
        search.step()
        gain = paired_bootstrap(result.scores, base.scores, seed)
        null = mean([mean(each.scores) for each in nulls])
        row = summary(result, seed)
        if gain[0] <= 0 or row.score <= null:
            raise search.refusal(
                f"the best cell does not hold on the test split: score {row.score:.2f}, unsteered "
                f"{mean(base.scores):.2f}, random control {null:.2f}"
            )
        per_prompt = None
        if adaptive:
            scored = search.full.prompts(search.full.scored(search.side))
            goal = common_goal(lm, chosen, search.odds, scored)
            most = max(abs(m) for m in (chosen.strength, *(window or ())))
            per_prompt = measure_adaptive(test, chosen, search.odds, goal, (0.0, most), seed)
        search.step()
    report = TuneReport(
        **vars(replace(row, samples=())),
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        model=lm.name,
        fingerprint=lm.fingerprint,
        method=str(vector.provenance.get("method", "given")),
        budget=budget,
        spill_budget=spill_budget,
        coherence_floor=coherence_floor,
        target=target,
        seed=seed,
        layers=chosen.layers,
        scope=str(chosen.scope),
        strength=chosen.strength,
        alpha=raw_alphas(chosen),
        window=window,
        baseline=mean(base.scores),
        gain=row.score - mean(base.scores),
        gain_low=gain[0],
        gain_high=gain[1],
        null=null,
        null_damage_p95=max(each.damage(seed).p95 for each in nulls),
        validation=search.passed,
        curve=curve,
        damage_coherence=search.damage_coherence(curve),
        candidates=tuple(search.looked),
        tried=tuple(search.tried),
        adaptive=per_prompt,
        model_calls=calls.rows + search.calls_elsewhere,
        seconds=round(time.monotonic() - started, 2),
    )
    kept = {f.name: getattr(chosen, f.name) for f in fields(VectorSteering)}
    note = {"budget": budget, "window": window, "score": row.score, "null": null}
    kept["provenance"] = {**chosen.provenance, "tuned": note}
    return Tuned(**kept, report=report)


def _plain(tuned: Tuned) -> VectorSteering:
    return VectorSteering(**{f.name: getattr(tuned, f.name) for f in fields(VectorSteering)})
