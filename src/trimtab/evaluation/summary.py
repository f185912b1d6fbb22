"""One evaluation in figures: the fields that every row of every table has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.evaluation.evaluate import Evaluation, Sample
from trimtab.results.intervals import share_interval
from trimtab.results.tables import number
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Score, coherence, damage and spill with 95 % intervals; formulas in docs/measures.md.

    Attributes:
        sign: +1 scored toward on away prompts, -1 the mirror image.
        score: mean verdict on the wanted side, with its interval `low` to `high`.
        n: scored prompts.
        coherence: mean coherence of the scored answers.
        damage: mean KL in nats per token along unsteered answers to prompts that already show the
            behavior; `damage_p95` over tokens, the interval over prompts.
        spill: the same on neutral prompts; None without any.
        scores: one per prompt, in the split's order.
        samples: every scored prompt with its answer before and after.
    """

    sign: int
    score: float
    low: float
    high: float
    n: int
    coherence: float
    coherence_low: float
    coherence_high: float
    damage: float
    damage_p95: float
    damage_low: float
    damage_high: float
    spill: float | None
    spill_p95: float | None
    spill_low: float | None
    spill_high: float | None
    scores: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()


def summary(result: Evaluation, seed: int, score: tuple[float, float] | None = None) -> Summary:
    """Summarize an evaluation; `score` replaces the interval of the score where given."""
    low, high = share_interval(result.scores, seed) if score is None else score
    coherent = share_interval(result.coherences, seed)
    damage, spill = result.damage(seed), result.spill(seed)
    return Summary(
        sign=result.sign,
        score=mean(result.scores),
        low=low,
        high=high,
        n=len(result.scores),
        coherence=mean(result.coherences),
        coherence_low=coherent[0],
        coherence_high=coherent[1],
        damage=damage.mean,
        damage_p95=damage.p95,
        damage_low=damage.low,
        damage_high=damage.high,
        spill=None if spill is None else spill.mean,
        spill_p95=None if spill is None else spill.p95,
        spill_low=None if spill is None else spill.low,
        spill_high=None if spill is None else spill.high,
        scores=result.scores,
        samples=result.samples,
    )


# What stands under every table of scores.
KL_NOTE = "damage: on-target KL, spill: off-target KL, nats per token; intervals 95 %"


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def raw_alphas(lever: object) -> dict[int, float]:
    """Return layer -> raw alpha of a vector that adds; ablate and affine add no fixed length."""
    if isinstance(lever, VectorSteering) and lever.operation == "add":
        return dict(lever.alphas)
    return {}


def alpha_text(alphas: dict[int, float]) -> str:
    """Write raw alphas in short: one figure, or the range over layers."""
    if not alphas:
        return number(None)
    low, high = number(min(alphas.values())), number(max(alphas.values()))
    return low if low == high else f"{low} to {high}"


def with_p95(value: float | None, p95: float | None) -> str:
    """Write a divergence as its mean and, in brackets, its 95th percentile."""
    return number(value) if value is None else f"{number(value, 3)} ({number(p95, 3)})"
