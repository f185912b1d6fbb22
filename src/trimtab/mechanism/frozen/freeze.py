"""What a steering loses when a part of the network is frozen: attention patterns, values, MLPs.

The steered model answers the test prompts with each part held at the unsteered model's, step by step
on the same tokens (held/lanes.py), and the judge scores the answers. **Points lost** are percentage
points of the score: 100 (score steered - score frozen), prompt by prompt. A null freezes by a
change of the same length in another direction. Source: arXiv 2604.08524, its freezing table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import judge_kind
from trimtab.mechanism.case import Case
from trimtab.mechanism.frozen.holding import HOLDS, WITHOUT_NULL, check_additive, parse_holds
from trimtab.mechanism.frozen.lanes import lane_answers
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
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
from trimtab.steering.vector import VectorSteering

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
        """Return one row.

        Raises:
            TrimtabError: there is none.
        """
        for row in self.rows:
            if (row.name, row.sign) == (name, sign):
                return row
        raise TrimtabError(
            asked=f"the row {name!r} of sign {sign:+d}",
            found=f"the rows {', '.join(f'{row.name} {row.sign:+d}' for row in self.rows)}",
            advice="name one of these",
        )

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
        columns = (
            "direction",
            "frozen",
            "score, %",
            "points lost",
            "null's",
            "lost, % of the gain",
            "coherence (null's)",
        )
        count = " and ".join(f"{n} ({sign:+d})" for sign, n in self.prompts.items())
        notes = (
            f"{count} prompts of the {self.split or 'whole'} split, judge {self.judge}, "
            f"95 % intervals, pairs of answers to the same prompt",
            f"null: {self.nulls} changes as large as the frozen part's, in other directions; "
            "attention patterns have none",
        )
        return Table(f"{self.behavior}: {self.vector}, frozen", columns, cells, notes)


@dataclass(frozen=True)
class _Run:
    """Answers and what they scored."""

    answers: list[str]
    scores: torch.Tensor
    coherences: list[float]

    @property
    def coherence(self) -> float:
        return sum(self.coherences) / len(self.coherences)


def freeze_table(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    freezes: Sequence[str] = FREEZES,
    signs: Sequence[int] = (1, -1),
    nulls: int = 2,
    split: str | None = "test",
    max_prompts: int | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> FreezeTable:
    """Score a steering with parts of the network frozen.

    Args:
        lm: the unsteered model.
        behavior: what is judged.
        vector: an additive steering; |strength| is used with each sign.
        freezes: names of held/holding.py, joined with + for several at once.
        signs: +1 to induce on prompts that do not show the behavior, -1 to remove it.
        nulls: changes of equal size per freeze that has any.
        split: train, validation or test; None for all prompts.
        max_prompts: cap per direction.
        max_new_tokens: length of answers.
        seed: of the split, the nulls and the bootstrap.
        progress: called with (runs done, runs in all).

    Raises:
        TrimtabError: a steering that does not add, or of strength 0; an unknown part; a behavior
            without a judge; a model whose heads cannot be found.
    """
    case = Case(lm, behavior, vector, tuple(signs), max_prompts, max_new_tokens, seed)
    return freeze_parts(case, freezes=freezes, nulls=nulls, split=split, progress=progress)


def freeze_parts(
    case: Case,
    *,
    freezes: Sequence[str] = FREEZES,
    nulls: int = 2,
    split: str | None = "test",
    progress: Progress | None = None,
) -> FreezeTable:
    """Score a case's steering with parts of the network frozen, see `freeze_table`."""
    lm, vector, signs, seed = case.lm, case.vector, case.signs, case.seed
    check_additive(vector)
    parts = {name: parse_holds(name) for name in freezes}
    if vector.strength == 0 or not set(signs) <= {1, -1}:
        raise TrimtabError(
            asked=f"what carries {vector.label} in the directions {list(signs)}",
            found="a strength of 0, or a direction that is neither 1 nor -1",
            advice="use vector.at(m) with the strength you steer at, and signs of 1 and -1",
        )
    data, judge = case.part(split), case.judge
    without = [name for name, held in parts.items() if set(held) & set(WITHOUT_NULL)]
    total = len(signs) * (2 + len(parts) + nulls * (len(parts) - len(without)))
    done, rows = 0, list[FreezeRow]()
    counts: dict[int, int] = {}
    strengths = {sign: sign * abs(vector.strength) for sign in signs}
    for sign in signs:
        prompts = case.prompts(data, sign)
        counts[sign], at = len(prompts), vector.at(strengths[sign])

        def run(
            holds: Sequence[str] | None,
            null: int | None = None,
            sign: int = sign,
            prompts: Sequence[Prompt] = prompts,
            at: VectorSteering = at,
        ) -> _Run:
            nonlocal done
            if holds is None:
                answers = case.answers(prompts)
            else:
                answers = lane_answers(
                    lm, at, prompts, holds, max_new_tokens=case.max_new_tokens, null_seed=null
                )
            done += 1
            if progress is not None:
                progress(done, total)
            scores = torch.tensor([verdict.share(sign) for verdict in judge(prompts, answers)])
            return _Run(answers, scores.double(), case.coherence(answers))

        base, whole = run(None), run(())
        rows += [_plain(sign, "unsteered", base, seed), _plain(sign, "steered", whole, seed)]
        for name, held in parts.items():
            seeds = [] if name in without else null_seeds(seed, nulls)
            frozen, random = run(held), [run(held, null) for null in seeds]
            rows.append(_row(sign, name, base, whole, frozen, random, seed))
    return FreezeTable(
        behavior=case.behavior.name,
        vector=vector.label,
        model=lm.name,
        split=split,
        judge=judge_kind(case.behavior),
        prompts=counts,
        strengths=strengths,
        nulls=nulls,
        max_new_tokens=case.max_new_tokens,
        seed=seed,
        rows=tuple(rows),
    )


def _plain(sign: int, name: str, run: _Run, seed: int) -> FreezeRow:
    nothing = (None, None, None, None)
    scores = tuple(run.scores.tolist())
    return FreezeRow(
        sign, name, _score(run, seed), run.coherence, *nothing, tuple(run.answers), scores
    )


def _row(
    sign: int, name: str, base: _Run, whole: _Run, frozen: _Run, nulls: list[_Run], seed: int
) -> FreezeRow:
    lost = whole.scores - frozen.scores
    return FreezeRow(
        sign=sign,
        name=name,
        score=_score(frozen, seed),
        coherence=frozen.coherence,
        lost=_percent(float(lost.mean()), paired_bootstrap(whole.scores, frozen.scores, seed)),
        share=_share(lost, whole.scores - base.scores, seed),
        null=_null(torch.stack([whole.scores - run.scores for run in nulls]), seed)
        if nulls
        else None,
        null_coherence=sum(run.coherence for run in nulls) / len(nulls) if nulls else None,
        answers=tuple(frozen.answers),
        scores=tuple(frozen.scores.tolist()),
    )


def _score(run: _Run, seed: int) -> Span:
    return _percent(float(run.scores.mean()), share_interval(run.scores, seed))


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
