"""What a steering loses when a part of the network is frozen: attention patterns, values, MLPs.

The steered model answers the test prompts with each part held at the unsteered model's, step by step
on the same tokens (frozen/lanes.py), and the judge scores the answers. **Points lost** are percentage
points of the score: 100 (score steered - score frozen), prompt by prompt. A null freezes by a
change of the same length in another direction. Source: arXiv 2604.08524, its freezing table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trimtab.evaluation.judges import judge_kind
from trimtab.evaluation.summary import mean
from trimtab.mechanism.case import Case, check_adds, counting
from trimtab.mechanism.frozen.holding import HOLDS, WITHOUT_NULL, parse_holds
from trimtab.mechanism.frozen.lanes import lane_answers
from trimtab.results import Progress
from trimtab.results.intervals import (
    bounded_interval,
    paired_bootstrap,
    ratio_bootstrap,
    share_interval,
    two_way_bootstrap,
)
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds

FREEZES = (*HOLDS, "ov+mlp")


@dataclass(frozen=True)
class Span:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def cell(self) -> str:
        """The figure as tables show it."""
        return with_interval(self.value, self.low, self.high, 1)


@dataclass(frozen=True)
class FreezeRow:
    """One run in one direction.

    Attributes:
        sign: +1 where the behavior is induced (m > 0), -1 where it is removed.
        name: "unsteered", "steered", or what is frozen.
        score: share of answers on the wanted side, in percent.
        coherence: mean over the answers, 0 to 1.
        lost: percentage points lost to the steered run; None on the first two rows.
        share: points lost over the points that steering gains; None where it gains none.
        null: points lost when the change is as large but in another direction; None without a null.
        null_coherence: of the null's answers.
        answers: of the run.
        scores: 0 to 1, one per prompt.
    """

    sign: int
    name: str
    score: Span
    coherence: float
    lost: Span | None
    share: Span | None
    null: Span | None
    null_coherence: float | None
    answers: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class FreezeTable(Printable):
    """The score with each part frozen, in each direction.

    Attributes:
        behavior: its name.
        vector: the steering's label.
        model: its name.
        split: whose prompts were answered.
        judge: kind of judge.
        prompts: sign -> how many prompts.
        strengths: sign -> multiplier m.
        nulls: null runs per freeze.
        max_new_tokens: length of answers.
        seed: of split, nulls and bootstrap.
        rows: in the order of the runs.
    """

    behavior: str
    vector: str
    model: str
    split: str | None
    judge: str
    prompts: dict[int, int]
    strengths: dict[int, float]
    nulls: int
    max_new_tokens: int
    seed: int
    rows: tuple[FreezeRow, ...]

    def row(self, name: str, sign: int) -> FreezeRow:
        """Return one row."""
        return next(row for row in self.rows if (row.name, row.sign) == (name, sign))

    def table(self) -> Table:
        """Return one line per run."""
        cells = tuple(
            (
                f"{'inducing' if row.sign > 0 else 'removing'} m={self.strengths[row.sign]:+.3g}",
                row.name,
                row.score.cell,
                *("" if span is None else span.cell for span in (row.lost, row.null, row.share)),
                number(row.coherence)
                + ("" if row.null_coherence is None else f" ({number(row.null_coherence)})"),
            )
            for row in self.rows
        )
        columns = ("direction", "frozen", "score, %", "points lost", "random")
        columns += ("lost, % of the gain", "coherence (random)")
        count = " and ".join(f"{n} ({sign:+d})" for sign, n in self.prompts.items())
        notes = (
            f"{count} prompts of the {self.split or 'whole'} split, judge {self.judge}, "
            f"95 % intervals, pairs of answers to the same prompt",
            f"random control: {self.nulls} changes as large as the frozen part's, in other directions; "
            "attention patterns have none",
        )
        return Table(f"{self.behavior}: {self.vector}, frozen", columns, cells, notes)


@dataclass(frozen=True)
class _FreezeRun:
    """Answers and what they scored."""

    answers: Sequence[str]
    scores: torch.Tensor
    coherence: float


def freeze_table(
    case: Case,
    *,
    freezes: Sequence[str] = FREEZES,
    nulls: int = 2,
    split: str | None = "test",
    progress: Progress | None = None,
) -> FreezeTable:
    """Score a steering with parts of the network frozen.

    Args:
        case: its vector runs at |m| to induce the behavior, at -|m| to remove it.
        freezes: names of frozen/holding.py, joined with + for several at once.
        nulls: changes of equal size per freeze that has any.
        split: train, validation or test; None for all prompts.
        progress: called with (runs done, runs in all).

    Raises:
        TrimtabError: a steering that does not add, or of strength 0; an unknown part; a behavior
            without a judge; a model whose heads cannot be found.
    """
    vector, seed = case.vector, case.seed
    check_adds(vector)
    parts = {name: parse_holds(name) for name in freezes}
    without = [name for name, held in parts.items() if set(held) & set(WITHOUT_NULL)]
    runs = 2 + len(parts) + nulls * (len(parts) - len(without))
    done = counting(progress, len(case.signs) * runs)
    data, rows = case.part(split), list[FreezeRow]()
    strengths = {sign: sign * abs(vector.strength) for sign in case.signs}
    prompts = {sign: case.prompts(data, sign) for sign in case.signs}

    def judged(sign: int, answers: Sequence[str]) -> _FreezeRun:
        scores, coherence = case.judged(prompts[sign], answers, sign)
        return done(_FreezeRun(answers, torch.tensor(scores, dtype=torch.float64), coherence))

    def frozen(sign: int, holds: Sequence[str], null: int | None = None) -> _FreezeRun:
        options = {"max_new_tokens": case.max_new_tokens, "null_seed": null}
        at = vector.at(strengths[sign])
        return judged(sign, lane_answers(case.lm, at, prompts[sign], holds, **options))

    for sign in case.signs:
        base, whole = judged(sign, case.answers(prompts[sign])), frozen(sign, ())
        rows += [_plain(sign, "unsteered", base, seed), _plain(sign, "steered", whole, seed)]
        for name, held in parts.items():
            seeds = [] if name in without else null_seeds(seed, nulls)
            run, random = frozen(sign, held), [frozen(sign, held, null) for null in seeds]
            rows.append(_row(sign, name, base, whole, run, random, seed))
    return FreezeTable(
        behavior=case.behavior.name,
        vector=vector.label,
        model=case.lm.name,
        split=split,
        judge=judge_kind(case.behavior),
        prompts={sign: len(some) for sign, some in prompts.items()},
        strengths=strengths,
        nulls=nulls,
        max_new_tokens=case.max_new_tokens,
        seed=seed,
        rows=tuple(rows),
    )


def _plain(sign: int, name: str, run: _FreezeRun, seed: int) -> FreezeRow:
    score = _percent(float(run.scores.mean()), share_interval(run.scores, seed))
    rest = (None, None, None, None, tuple(run.answers), tuple(run.scores.tolist()))
    return FreezeRow(sign, name, score, run.coherence, *rest)


def _row(
    sign: int, name: str, base: _FreezeRun, whole: _FreezeRun, frozen: _FreezeRun, nulls: list[_FreezeRun], seed: int
) -> FreezeRow:
    lost = whole.scores - frozen.scores
    return replace(
        _plain(sign, name, frozen, seed),
        lost=_percent(float(lost.mean()), paired_bootstrap(whole.scores, frozen.scores, seed)),
        share=_share(lost, whole.scores - base.scores, seed),
        null=_null(torch.stack([whole.scores - run.scores for run in nulls]), seed)
        if nulls
        else None,
        null_coherence=mean([run.coherence for run in nulls]) if nulls else None,
    )


def _null(grid: torch.Tensor, seed: int) -> Span:
    """Points lost `[nulls, prompts]`: other directions and other prompts might have been drawn."""
    low, high = two_way_bootstrap((grid + 1) / 2, seed)  # from [-1, 1] to the [0, 1] of shares
    return _percent(float(grid.mean()), (2 * low - 1, 2 * high - 1))


def _share(lost: torch.Tensor, gained: torch.Tensor, seed: int) -> Span | None:
    """What is lost of what was gained; the interval draws prompts, not directions."""
    if float(gained.sum()) <= 0:
        return None
    ratio = float(lost.sum() / gained.sum())
    if bool((lost == ratio * gained).all()):
        # Prompts that all agree have no spread to draw from, which is not certainty.
        alike = (lost / gained)[gained != 0]
        return _percent(ratio, bounded_interval(alike, 0.0, 1.0, seed))
    return _percent(ratio, ratio_bootstrap(lost.tolist(), gained.tolist(), seed))


def _percent(value: float, interval: tuple[float, float]) -> Span:
    return Span(100 * value, 100 * interval[0], 100 * interval[1])
