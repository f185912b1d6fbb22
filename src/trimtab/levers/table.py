"""All levers for one behavior on one axis: what each moves, breaks and costs under one budget.

Levers are found on the train split (found.py), put at the largest strength whose 95th percentile of
damage keeps the budget on the validation split (settle.py), and scored on the test split.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.compare import averaged
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import Summary, mean, summary
from trimtab.levers.advice import Advice, advise
from trimtab.levers.conversions.conversion import Setting
from trimtab.levers.conversions.recovered import gaps_of
from trimtab.levers.entries import Entry, Lever, entries_of
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.perplexity import Text
from trimtab.levers.row import COLUMNS, LeverRow, closed_share, validated
from trimtab.levers.settle import Bench
from trimtab.levers.timing import ROUNDS, extra_time
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.teacher import switched
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap
from trimtab.results.tables import Printable, Table
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering

SLACK = 1.02  # strengths are solved for to a few per cent of damage
SHOWN = 2  # samples kept per row
STEPS_FOUND = 4


@dataclass(frozen=True)
class LeversTable(Printable):
    """Every lever for one behavior under one budget.

    Attributes:
        behavior: its name; `data_hash` of its prompts.
        model: the unsteered model; `fingerprint` of its weights.
        sign: +1 toward, -1 away.
        budget: of damage, nats per token, 95th percentile.
        seed: of splits, training, nulls and intervals.
        rows: the unsteered model first, the random direction last.
        missing: rows that are not there, and why.
        advice: which lever to choose.
        text: whose perplexity is read.
        seconds: on the clock, finding included where it was done here.
    """

    behavior: str
    data_hash: str
    model: str
    fingerprint: str
    sign: int
    budget: float
    seed: int
    rows: tuple[LeverRow, ...]
    missing: dict[str, str]
    advice: Advice
    text: str
    seconds: float

    def row(self, name: str) -> LeverRow:
        """Return the row of that name.

        Raises:
            TrimtabError: when there is none, with the reason.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise TrimtabError(
            asked=f"the row {name!r}",
            found=self.missing.get(name, ", ".join(repr(row.name) for row in self.rows)),
            advice="use the name of a row that is there",
        )

    def table(self) -> Table:
        """Return one line per lever, what is missing and the advice underneath."""
        side = "toward" if self.sign > 0 else "away"
        notes = [
            self.advice.sentence,
            "gap closed: share of prompts whose readout gap lies on the wanted side; gap: its mean, nats",
            "damage: nats per token along answers that already show it; OVER: more than the budget",
            f"perplexity: {self.text}; ms/token: extra, median of interleaved runs",
            "context in tokens; calls: rows put through the model in forward passes; intervals 95 %",
            *(f"no {name}: {why}" for name, why in self.missing.items()),
        ]
        return Table(
            f"{self.behavior}, {side}, within {self.budget:g} nats: levers on the test split of {self.model}",
            COLUMNS,
            tuple(row.cells() for row in self.rows),
            tuple(notes),
        )


def levers_table(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    budget: float = 0.5,
    sign: int = 1,
    vector: VectorSteering | None = None,
    prompt: PromptSteering | None = None,
    found: FoundLevers | None = None,
    effort: Effort | None = None,
    nulls: int = 2,
    max_prompts: int = 32,
    max_new_tokens: int = 40,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LeversTable:
    """Compare the levers for a behavior at an equal budget of damage.

    Args:
        lm: the unsteered model; float32 for exact figures.
        behavior: split here: train finds, validation places and decides, test scores.
        budget: greatest p95 damage, nats per token.
        sign: +1 toward, -1 away.
        vector: whose directions are used in place of found ones.
        prompt: used in place of a searched one.
        found: of `find_levers`, to share between budgets.
        effort: how much is spent on finding.
        nulls: random directions of the vector's size.
        max_prompts: cap per side and split.
        max_new_tokens: length of answers.
        rounds: interleaved runs that are timed.
        seed: of everything random.
        progress: called with (steps done, steps in all).

    Raises:
        TrimtabError: a budget that is not above 0, an unusable behavior, or levers found for another
            one. A lever that cannot be made is listed in `missing`.
    """
    if not 0 < budget < float("inf") or nulls < 1:
        raise TrimtabError(
            asked=f"levers within {budget} nats beside {nulls} random directions",
            found="a budget that is not above 0, or no null",
            advice="give nats per token such as 0.5 and at least one null",
        )
    started, side = time.monotonic(), 1 if sign > 0 else -1
    setting = Setting(
        lm, behavior, sign=side, max_prompts=max_prompts, max_new_tokens=max_new_tokens, seed=seed
    )
    validation, test = setting.validation, setting.test
    ticks = _Ticks(progress, 0 if found is not None else STEPS_FOUND)
    levers = found or find_levers(
        lm, behavior, sign=side, vector=vector, prompt=prompt, effort=effort, seed=seed,
        progress=ticks.finding,
    )  # fmt: skip
    if (levers.behavior, levers.sign, levers.seed) != (behavior.name, side, seed):
        raise TrimtabError(
            asked=f"levers for {behavior.name!r}, sign {side:+d}, seed {seed}",
            found=f"levers found for {levers.behavior!r}, sign {levers.sign:+d}, seed {levers.seed}",
            advice="find them for this behavior, sign and seed",
        )
    bench = Bench(lm, validation, budget, side, seed)
    with tempfile.TemporaryDirectory() as folder:
        entries, missing = entries_of(bench, levers, behavior, nulls, Path(folder), ticks.settling)
        neutral = "neutral" if test.prompts("neutral") else bench.shown
        text = Text.sampled(lm, test.prompts(neutral), max_new_tokens, seed)
        first = test.prompts(test.scored(side))[0]
        times = extra_time(lm, {e.name: e.levers[0] for e in entries}, first, rounds=rounds)
        table = _Measured(lm, behavior, bench, test, text, times, ticks)
        rows = table.rows(entries)
    return LeversTable(
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        model=lm.name or type(lm.model).__name__,
        fingerprint=lm.fingerprint,
        sign=side,
        budget=budget,
        seed=seed,
        rows=rows,
        missing=missing,
        advice=advise(rows, behavior.name, budget, seed),
        text=f"unsteered answers to {len(text.rows)} {neutral} prompts, sampled at temperature 1",
        seconds=round(time.monotonic() - started, 2),
    )


@dataclass
class _Ticks:
    """Progress over finding, settling and scoring."""

    progress: Progress | None
    first: int
    entries: int = 10
    done: int = 0

    def finding(self, done: int, steps: int) -> None:
        self.done = done
        self._tell()

    def settling(self, done: int, steps: int) -> None:
        self.done, self.entries = self.first + done, steps
        self._tell()

    def scoring(self, done: int, steps: int) -> None:
        self.done = self.first + self.entries + done
        self._tell(steps)

    def _tell(self, scored: int | None = None) -> None:
        if self.progress is not None:
            last = self.entries if scored is None else scored
            self.progress(self.done, self.first + self.entries + last)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Turns entries into rows."""

    lm: LanguageModel
    behavior: Behavior
    bench: Bench
    test: Evaluator
    text: Text
    times: dict[str, float]
    ticks: _Ticks

    def rows(self, entries: Sequence[Entry]) -> tuple[LeverRow, ...]:
        """Measure every entry, the unsteered model first."""
        rows: list[LeverRow] = []
        for number, entry in enumerate(entries, 1):
            rows.append(self._row(entry, rows[0].scores if rows else None))
            self.ticks.scoring(number, len(entries))
        return tuple(rows)

    def _row(self, entry: Entry, base: tuple[float, ...] | None) -> LeverRow:
        sign, seed = self.bench.sign, self.bench.seed
        results = [self.test.run(lever, sign) for lever in entry.levers]
        summed = summary(results[0], seed) if len(results) == 1 else averaged(results, seed)
        before = base or summed.scores
        checked = validated([self.bench.validation.run(x, sign) for x in entry.levers], seed)
        prompts = self.test.prompts(self.test.scored(sign))
        gaps = [self._gaps(lever, prompts) for lever in entry.levers]
        known = [g for g in gaps if g is not None]
        kept = {f.name: getattr(summed, f.name) for f in fields(Summary)}
        kept["samples"] = summed.samples[:SHOWN]
        low, high = paired_bootstrap(summed.scores, before, seed)
        return LeverRow(
            **kept,
            name=entry.name,
            kind=entry.kind,
            lever=entry.label,
            strength=entry.strength,
            limited_by=entry.limited_by,
            within=checked.damage_p95 <= SLACK * self.bench.budget,
            validation=checked,
            gap=mean([float(g.mean()) for g in known]) if known else None,
            closed=closed_share(known, sign, seed) if known else None,
            gain=summed.score - mean(before),
            gain_low=low,
            gain_high=high,
            perplexity=mean([self.text.perplexity(self.lm, lever) for lever in entry.levers]),
            context_tokens=self._context(entry.levers[0], prompts),
            ms_per_token=self.times[entry.name],
            baked=entry.baked,
            bakeable=entry.bakeable,
            calls=entry.calls,
            residual=entry.residual,
        )

    def _gaps(self, lever: Lever, prompts: list[Prompt]) -> Tensor | None:
        data = self.test.behavior
        if isinstance(lever, LanguageModel):
            return gaps_of(lever, data, prompts, None)
        return gaps_of(self.lm, data, prompts, lever)

    def _context(self, lever: Lever, prompts: list[Prompt]) -> float:
        plain = sum(len(self.lm.encode(prompt).ids) for prompt in prompts)
        if lever is None or isinstance(lever, LanguageModel):
            return 0.0
        with switched(self.lm, lever):
            return (sum(len(self.lm.encode(p).ids) for p in prompts) - plain) / len(prompts)
