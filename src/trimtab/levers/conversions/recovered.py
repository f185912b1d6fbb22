"""How much of one lever's effect another one has: the gap and the behavior recovered.

On the prompts of a split, with g the readout gap at the first answer position,

    gap recovered = sum_i (g_i(after) - g_i) / sum_i (g_i(before) - g_i)

where g_i is unsteered, before is the lever that was converted and after what it became; the
behavior recovered is the same of the judge's scores. 1 is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.evaluate import Evaluation, Evaluator
from trimtab.evaluation.readout import gap
from trimtab.evaluation.summary import mean
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.teacher import switched
from trimtab.results.intervals import Interval, paired_bootstrap, ratio_bootstrap, share_interval
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.vector import Switch

Lever: TypeAlias = "Switch | LanguageModel | None"
LEAST_EFFECT = 0.05  # a score that moved less has nothing to recover


@dataclass(frozen=True)
class Effect:
    """One lever on the scored prompts of a split.

    Attributes:
        name: which lever.
        gap: mean readout gap, nats; None for a behavior without readout words.
        score: mean verdict on the wanted side with its interval.
        coherence: mean of the answers.
        damage_p95: nats per token, 95th percentile.
    """

    name: str
    gap: float | None
    score: Interval
    coherence: float
    damage_p95: float


@dataclass(frozen=True)
class Recovered(Printable):
    """The lever before and after a conversion, beside the unsteered model and a null.

    Attributes:
        behavior: its name.
        sign: +1 toward, -1 away.
        n: prompts.
        effects: unsteered, before, after, and the null where there is one.
        gap: share of the gap's movement recovered, with its interval; None without readout words.
        score: share of the score's movement recovered; None where it moved by less than 0.05.
        null_gap: the null's share of the gap's movement; None without a null.
    """

    behavior: str
    sign: int
    n: int
    effects: tuple[Effect, ...]
    gap: Interval | None
    score: Interval | None
    null_gap: float | None

    def effect(self, name: str) -> Effect:
        """Return the effect of `unsteered`, `before`, `after` or `null`."""
        return next(effect for effect in self.effects if effect.name == name)

    def table(self) -> Table:
        rows = tuple(
            (
                e.name,
                number(e.gap),
                e.score.cell,
                number(e.coherence),
                number(e.damage_p95, 3),
            )
            for e in self.effects
        )
        note = f"{self.n} prompts of {self.behavior}, sign {self.sign:+d}; intervals 95 %"
        if self.null_gap is not None:
            note += f"; the random control recovers {number(self.null_gap)} of the gap"
        columns = ("lever", "gap", "score", "coherence", "damage p95")
        return Table(f"recovered: {self.told}", columns, rows, (note,))

    @property
    def told(self) -> str:
        """The shares recovered with their intervals, in short."""
        shares = (("gap", self.gap), ("behavior", self.score))
        parts = [f"{name} {share.cell}" for name, share in shares if share is not None]
        return ", ".join(parts) or "nothing that the lever moved"


def recovered(
    lm: LanguageModel,
    evaluator: Evaluator,
    before: Switch,
    after: Switch,
    *,
    sign: int = 1,
    null: Switch | None = None,
    seed: int = 0,
) -> Recovered:
    """Measure a lever and what it was converted into on the same prompts.

    The evaluator is of a split on which nothing was chosen; the null is the same conversion of
    something without meaning, such as a random direction.
    """
    data, prompts = evaluator.behavior, evaluator.prompts(evaluator.scored(sign))
    levers: dict[str, Switch | None] = {"unsteered": None, "before": before, "after": after}
    levers |= {} if null is None else {"null": null}
    results = {name: evaluator.run(lever, sign) for name, lever in levers.items()}
    gaps = {name: gaps_of(lm, data, prompts, lever) for name, lever in levers.items()}
    rest = gaps["unsteered"]
    moved: dict[str, list[float]] = {}
    for name, values in gaps.items():
        if values is not None and rest is not None:
            moved[name] = (values - rest).tolist()
    effects: list[Effect] = []
    for name, result in results.items():
        values = gaps[name]
        mean_gap = None if values is None else float(values.mean())
        score = Interval(mean(result.scores), *share_interval(result.scores, seed))
        damage = result.damage(seed).p95
        effects.append(Effect(name, mean_gap, score, mean(result.coherences), damage))
    return Recovered(
        behavior=data.name,
        sign=sign,
        n=len(prompts),
        effects=tuple(effects),
        gap=_share(moved["after"], moved["before"], seed) if moved else None,
        score=_behavior(results, seed),
        null_gap=_share(moved["null"], moved["before"], seed)[0] if "null" in moved else None,
    )


def used(lm: LanguageModel, lever: Lever) -> tuple[LanguageModel, Switch | None]:
    """Return the model that is run with a lever, and what is on in it: another model runs as it is."""
    return (lever, None) if isinstance(lever, LanguageModel) else (lm, lever)


def gaps_of(
    lm: LanguageModel, behavior: Behavior, prompts: Sequence[Prompt], lever: Lever
) -> torch.Tensor | None:
    """Return the readout gap of every prompt under a lever, `[n]` nats; None without readout words."""
    if behavior.readout is None:
        return None
    model, switch = used(lm, lever)
    with switched(model, switch):
        return gap(model, behavior, prompts).double()


def _share(part: Sequence[float], whole: Sequence[float], seed: int) -> Interval:
    """The ratio of two sums over prompts, which are resampled."""
    side = 1.0 if sum(whole) >= 0 else -1.0  # the bootstrap of a ratio wants a positive divisor
    below, above = [side * x for x in whole], [side * x for x in part]
    if not sum(below) > 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(sum(above) / sum(below), *ratio_bootstrap(above, below, seed))


def _behavior(results: dict[str, Evaluation], seed: int) -> Interval | None:
    """The share of the score's movement; its interval that of after - before, paired."""
    rest, before, after = (results[name].scores for name in ("unsteered", "before", "after"))
    moved = mean(before) - mean(rest)
    if abs(moved) < LEAST_EFFECT:
        return None
    ends = sorted(1 + bound / moved for bound in paired_bootstrap(after, before, seed))
    return Interval((mean(after) - mean(rest)) / moved, *ends)
