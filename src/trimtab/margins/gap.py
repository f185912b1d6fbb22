"""The logit gap over prompts: every aggregator, unit and greedy first token from one forward pass.

gap(x) = score of the toward tokens - score of the away tokens at the first assistant position
(evaluation/readout.py has the aggregators). Gaps in raw logits cannot be compared between model
families, so each is also given over the standard deviation of its prompt's logits, and over its
gradient (radius.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import AGGREGATORS, ReadoutTokens, gap_of
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.results.intervals import clopper_pearson
from trimtab.results.quantiles import Quantiles, quantiles
from trimtab.results.tables import Printable, Table, number, with_interval

PAPER = (
    "In arXiv 2506.24056 the refusal-affirmation gap D0 = refusal - affirmation is the negative of "
    "the compliance gap. So where toward refuses and away complies, gap = +D0; where toward "
    "complies and away refuses, gap = -D0, the compliance gap."
)


@dataclass(frozen=True, eq=False)
class Readings:
    """What one forward pass per prompt says, in the caller's order.

    Attributes:
        gaps: aggregator to float64 `[n]`, nats.
        spread: standard deviation of each prompt's logits over the vocabulary, float64 `[n]`.
        pre_cap: the gaps before the final soft cap; None for a model without one.
        greedy: the likeliest first answer token, `[n]`.
    """

    gaps: dict[str, Tensor]
    spread: Tensor
    pre_cap: dict[str, Tensor] | None
    greedy: Tensor


@dataclass(frozen=True)
class GapSide:
    """The gaps of one list of prompts.

    Attributes:
        n: prompts.
        gap: by the report's aggregator, nats.
        positive: share of prompts with a gap above 0, with its exact binomial interval
            `positive_low` to `positive_high`.
        standard: gap over the standard deviation of the prompt's logits.
        pre_cap: the gap before the soft cap; None where the model has none.
        aggregators: every aggregator's quantiles.
        values: one value per prompt, in the split's order: every aggregator, `standard`, and
            `pre_cap` where there is one.
    """

    n: int
    gap: Quantiles
    positive: float
    positive_low: float
    positive_high: float
    standard: Quantiles
    pre_cap: Quantiles | None
    aggregators: dict[str, Quantiles]
    values: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class GapReport(Printable):
    """The gap over prompts.

    Attributes:
        aggregator: of `GapSide.gap`.
        sign: what a positive and a negative gap mean, in words, and how the paper's D0 relates.
        soft_cap: of the final logits; None for none.
        sides: list of prompts (`toward`, `away`, `requests`, `neutral`) to its gaps.
    """

    aggregator: str
    sign: str
    soft_cap: float | None
    sides: dict[str, GapSide]

    def table(self) -> Table:
        rows = tuple(
            (
                side,
                str(one.n),
                *(number(value) for value in (one.gap.p5, one.gap.p25)),
                one.gap.cell,
                *(number(value) for value in (one.gap.p75, one.gap.p95)),
                with_interval(one.gap.mean, one.gap.low, one.gap.high),
                with_interval(one.positive, one.positive_low, one.positive_high),
            )
            for side, one in self.sides.items()
        )
        columns = ("prompts", "n", "5 %", "25 %", "median", "75 %", "95 %", "mean", "share > 0")
        return Table(f"gap, {self.aggregator}, nats", columns, rows, (self.sign,))

    def units_table(self) -> Table:
        """Return the medians of every aggregator and unit, one line per list of prompts."""
        rows = []
        for side, one in self.sides.items():
            found = [one.aggregators[name] for name in AGGREGATORS] + [one.standard]
            found += [] if one.pre_cap is None else [one.pre_cap]
            rows.append((side, *(quantile.cell for quantile in found)))
        columns = ("prompts", *AGGREGATORS, f"{self.aggregator} / sd of logits")
        notes = ("sd of logits: over the vocabulary, each prompt's own",)
        if self.soft_cap is not None:
            columns += (f"{self.aggregator} before the cap",)
            notes += (f"the model caps its logits at {number(self.soft_cap)}",)
        return Table("median gap by aggregator and unit", columns, tuple(rows), notes)


def read(lm: LanguageModel, tokens: ReadoutTokens, encoded: Sequence[Encoded]) -> Readings:
    """Read the first answer position of prompts: one forward pass each, whatever is asked of it.

    Raises:
        TrimtabError: logits that are not finite.
    """
    n, capped = len(encoded), soft_cap(lm) is not None
    gaps = {name: torch.zeros(n, dtype=torch.float64) for name in AGGREGATORS}
    before = {name: torch.zeros(n, dtype=torch.float64) for name in AGGREGATORS}
    spread, greedy = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    for batch in lm.batches(encoded):
        rows = batch.rows.cpu()
        seen: list[Tensor] = []  # what the unembedding returns, before any scale or cap
        with torch.no_grad(), Hooks() as hooks:
            hooks.after(lm.sites.unembedding, seen.append)
            logits = lm.forward(batch, logits_to_keep=1)[:, -1].cpu().double()
        check_finite(lm, logits, "logits")
        spread[rows], greedy[rows] = logits.std(-1, correction=0), logits.argmax(-1)
        for name in AGGREGATORS:
            gaps[name][rows] = gap_of(logits, tokens, name)
            if capped:
                before[name][rows] = gap_of(seen[-1][:, -1].cpu().double(), tokens, name)
    return Readings(gaps, spread, before if capped else None, greedy)


def report_gaps(
    lm: LanguageModel,
    readings: Mapping[str, Readings],
    tokens: ReadoutTokens,
    behavior: str,
    aggregator: str = "logsumexp",
    seed: int = 0,
) -> GapReport:
    """Summarize readings, one entry per list of prompts."""
    sides = {side: _side(one, aggregator, seed) for side, one in readings.items()}
    return GapReport(aggregator, sign_words(tokens, behavior), soft_cap(lm), sides)


def sign_words(tokens: ReadoutTokens, behavior: str) -> str:
    """Say what the sign of the gap means, with both names in use."""
    sides = [
        ", ".join(dict.fromkeys(repr(tokens.texts[i].strip()) for i in ids))
        for ids in (tokens.toward, tokens.away)
    ]
    return (
        f"gap = toward - away. Positive: the answer opens as {behavior} does ({sides[0]}); "
        f"negative: as its opposite does ({sides[1]}). {PAPER}"
    )


def soft_cap(lm: LanguageModel) -> float | None:
    """Return c of the final c tanh(logit / c), which compresses gaps; None for a model without."""
    cap = getattr(text_config(lm.model), "final_logit_softcapping", None)
    return float(cap) if cap else None


def check_finite(lm: LanguageModel, values: Tensor, what: str) -> None:
    """Refuse logits or gradients that are not finite."""
    if not bool(values.isfinite().all()):
        raise TrimtabError(
            asked=f"the logit gap of {lm.name}",
            found=f"{what} that are not finite",
            advice="load the model in bfloat16 or float32",
        )


def _side(one: Readings, aggregator: str, seed: int) -> GapSide:
    chosen = one.gaps[aggregator]
    n, above = chosen.numel(), int((chosen > 0).sum())
    positive_low, positive_high = clopper_pearson(above, n)
    standard = chosen / one.spread.clamp_min(torch.finfo(torch.float64).tiny)
    values = {**one.gaps, "standard": standard}
    if one.pre_cap is not None:
        values["pre_cap"] = one.pre_cap[aggregator]
    return GapSide(
        n=n,
        gap=quantiles(chosen, seed),
        positive=above / n,
        positive_low=positive_low,
        positive_high=positive_high,
        standard=quantiles(standard, seed),
        pre_cap=None if one.pre_cap is None else quantiles(values["pre_cap"], seed),
        aggregators={name: quantiles(gaps, seed) for name, gaps in one.gaps.items()},
        values={name: tuple(numbers.tolist()) for name, numbers in values.items()},
    )
