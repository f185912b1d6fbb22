"""One row of the levers table: what a lever moves, breaks, costs, and where it can live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.evaluation.evaluate import Evaluation
from trimtab.evaluation.summary import Summary, with_p95
from trimtab.results.intervals import Interval, share_interval
from trimtab.results.tables import ABSENT, clean, number, with_interval

COLUMNS = (
    *("lever", "m", "gap closed", "gap", "score", "coherence", "perplexity", "damage (p95)"),
    *("context", "ms/token", "bakeable", "calls"),
)


@dataclass(frozen=True)
class Validated:
    """The same lever on the validation split, on which it was placed and is compared with others.

    Attributes:
        scores: one per prompt.
        score: their mean.
        coherence: mean.
        damage_p95: nats per token.
    """

    scores: tuple[float, ...]
    score: float
    coherence: float
    damage_p95: float


@dataclass(frozen=True, kw_only=True)
class LeverEntry:
    """A lever at its strength, and what it took to get there.

    Attributes:
        name: of the row.
        kind: `baseline`, `prompt`, `vector`, `weights` or `null`.
        lever: what it is, in short.
        strength: the multiplier m; None for what is either there or not.
        limited_by: `budget`; `range` where the largest strength tried still keeps it; `as found`
            for what has no strength.
        calls: rows put through the model to find and place it, forward passes alone.
        baked: whether weights can hold it exactly.
        bakeable: by which route, or why not.
        residual: what its conversion lost; None where nothing was converted.
    """

    name: str
    kind: str
    lever: str
    strength: float | None = None
    limited_by: str = "as found"
    calls: int = 0
    baked: bool = False
    bakeable: str = ""
    residual: float | None = None


@dataclass(frozen=True, kw_only=True)
class LeverRow(Summary, LeverEntry):
    """One lever; figures without another word are those of the test split.

    Attributes:
        within: whether p95 damage on validation keeps the budget.
        validation: score, coherence and damage there.
        gap: mean readout gap, nats; None without readout words.
        closed: share of prompts with the gap on the wanted side, with its interval.
        gain: score minus the unsteered model's on the same prompts, with its paired interval.
        perplexity: of neutral text under the lever (perplexity.py).
        context_tokens: tokens of context it takes, mean over prompts.
        ms_per_token: extra time per answer token, milliseconds, median of interleaved runs.
    """

    within: bool
    validation: Validated
    gap: float | None
    closed: Interval | None
    gain: float
    gain_low: float
    gain_high: float
    perplexity: float
    context_tokens: float
    ms_per_token: float

    def cells(self) -> tuple[str, ...]:
        over = "" if self.within or self.kind == "null" else " OVER"
        collapsed = " COLLAPSE" if self.gain > 0 and self.coherence < 0.5 else ""
        base = self.kind == "baseline"
        return (
            self.name,
            ABSENT if self.strength is None else f"{self.strength:+.3g}",
            ABSENT if self.closed is None else self.closed.cell,
            number(self.gap),
            with_interval(self.score, self.low, self.high),
            number(self.coherence) + collapsed,
            number(self.perplexity),
            with_p95(self.damage, self.damage_p95) + over,
            number(self.context_tokens, 0),
            ABSENT if base else f"{self.ms_per_token:+.2f}",
            clean(self.bakeable) or ABSENT,
            str(self.calls),
        )


def validated(results: Sequence[Evaluation], seed: int) -> Validated:
    """Summarize one evaluation, or the mean of several of one kind (nulls)."""
    scores = tuple(sum(same) / len(same) for same in zip(*(r.scores for r in results), strict=True))
    coherences = [c for r in results for c in r.coherences]
    damage = [r.damage(seed).p95 for r in results]
    return Validated(
        scores,
        sum(scores) / len(scores),
        sum(coherences) / len(coherences),
        sum(damage) / len(damage),
    )


def closed_share(gaps: Sequence[torch.Tensor], sign: int, seed: int) -> Interval:
    """Return the share of prompts whose gap lies on the wanted side, the mean over several levers."""
    shares = torch.stack([(sign * g > 0).double() for g in gaps]).mean(0)
    return Interval(float(shares.mean()), *share_interval(shares, seed))
