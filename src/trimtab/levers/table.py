"""All levers for one behavior on one axis: what each moves, breaks and costs under one budget.

Levers are found on the train split (found.py), put at the largest strength whose 95th percentile of
damage keeps the budget on the validation split (settle.py), and scored on the test split.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.compare import averaged
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean, summary
from trimtab.levers.advice import Advice, advise
from trimtab.levers.conversions.conversion import Setting
from trimtab.levers.conversions.recovered import gaps_of, used
from trimtab.levers.entries import NAMES, Made, entries_of
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.perplexity import Text
from trimtab.levers.row import COLUMNS, LeverEntry, LeverRow, closed_share, validated
from trimtab.levers.settle import Bench
from trimtab.levers.timing import ROUNDS, extra_time
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.teacher import switched
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap
from trimtab.results.tables import Printable, Table
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import SLACK

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
        side = "toward" if self.sign > 0 else "away"
        notes = [
            self.advice.sentence,
            "gap closed: share of prompts whose readout gap lies on the wanted side; gap: its mean, nats",
            "damage: on-target KL, nats per token along answers that already show it; OVER: above the budget",
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


def compare_levers(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    budget: float = 0.5,
    direction: Side = "toward",
    vector: VectorSteering | None = None,
    prompt: PromptSteering | None = None,
    found: FoundLevers | None = None,
    effort: Effort | None = None,
    nulls: int = NULLS,
    max_prompts: int | None = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LeversTable:
    """Compare the levers for a behavior at an equal budget of damage.

    Args:
        lm: the unsteered model; float32 for exact figures.
        behavior: split here: train finds, validation places and decides, test scores.
        budget: greatest p95 damage, nats per token.
        direction: `toward` or `away`.
        vector: whose directions are used in place of found ones.
        prompt: used in place of a searched one.
        found: of `find_levers`, to share between budgets.
        effort: how much is spent on finding.
        nulls: random directions of the vector's size.
        max_prompts: cap per side and split; None for all.
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
            found="a budget that is not above 0, or no random control",
            advice="give nats per token such as 0.5 and at least one random direction",
        )
    started, side = time.monotonic(), sign_of(direction)
    setting = Setting(
        lm, behavior, sign=side, max_prompts=max_prompts, max_new_tokens=max_new_tokens, seed=seed
    )
    validation, test = setting.validation, setting.test
    looked = 0 if found is not None else STEPS_FOUND

    def stage(before: int, behind: int) -> Progress:
        """Progress of one stage between the steps before it and those after it."""

        def tell(done: int, steps: int) -> None:
            if progress is not None:
                progress(before + done, before + steps + behind)

        return tell

    levers = found or find_levers(
        lm, behavior, direction=direction, vector=vector, prompt=prompt, effort=effort, seed=seed,
        progress=stage(0, 2 * len(NAMES)),
    )  # fmt: skip
    if (levers.behavior, levers.sign, levers.seed) != (behavior.name, side, seed):
        raise TrimtabError(
            asked=f"levers for {behavior.name!r}, sign {side:+d}, seed {seed}",
            found=f"levers found for {levers.behavior!r}, sign {levers.sign:+d}, seed {levers.seed}",
            advice="find them for this behavior, sign and seed",
        )
    bench = Bench(lm, validation, budget, side, seed)
    with tempfile.TemporaryDirectory() as folder:
        settling, scoring = stage(looked, len(NAMES)), stage(looked + len(NAMES), 0)
        entries, missing = entries_of(bench, levers, behavior, nulls, Path(folder), settling)
        neutral = "neutral" if test.prompts("neutral") else bench.shown
        text = Text.sampled(lm, test.prompts(neutral), max_new_tokens, seed)
        first = test.prompts(test.scored(side))[0]
        times = extra_time(lm, {e.name: e.levers[0] for e in entries}, first, rounds=rounds)
        rows: list[LeverRow] = []
        for number, entry in enumerate(entries, 1):
            before = rows[0].scores if rows else None
            rows.append(_row(bench, test, text, entry, times[entry.name], before))
            scoring(number, len(entries))
    return LeversTable(
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        model=lm.name or type(lm.model).__name__,
        fingerprint=lm.fingerprint,
        sign=side,
        budget=budget,
        seed=seed,
        rows=tuple(rows),
        missing=missing,
        advice=advise(rows, behavior.name, budget, seed),
        text=f"unsteered answers to {len(text.rows)} {neutral} prompts, sampled at temperature 1",
        seconds=round(time.monotonic() - started, 2),
    )


def _row(
    bench: Bench,
    test: Evaluator,
    text: Text,
    entry: Made,
    ms_per_token: float,
    unsteered: Sequence[float] | None,
) -> LeverRow:
    """Measure an entry; `unsteered` are the scores of the model itself, None for its own row."""
    lm, sign, seed = bench.lm, bench.sign, bench.seed
    results = [test.run(lever, sign) for lever in entry.levers]
    summed = summary(results[0], seed) if len(results) == 1 else averaged(results, seed)
    before = unsteered or summed.scores
    low, high = paired_bootstrap(summed.scores, before, seed)
    checked = validated([bench.validation.run(lever, sign) for lever in entry.levers], seed)
    prompts = test.prompts(test.scored(sign))
    gaps = [gaps_of(lm, test.behavior, prompts, lever) for lever in entry.levers]
    known = [g for g in gaps if g is not None]
    lengths = []
    for lever in (None, entry.levers[0]):
        model, switch = used(lm, lever)
        with switched(model, switch):
            lengths.append(sum(len(model.encode(prompt).ids) for prompt in prompts))
    return LeverRow(
        **vars(replace(summed, samples=summed.samples[:SHOWN])),
        **{f.name: getattr(entry, f.name) for f in fields(LeverEntry)},
        within=checked.damage_p95 <= SLACK * bench.budget,
        validation=checked,
        gap=mean([float(g.mean()) for g in known]) if known else None,
        closed=closed_share(known, sign, seed) if known else None,
        gain=summed.score - mean(before),
        gain_low=low,
        gain_high=high,
        perplexity=mean([text.perplexity(lm, lever) for lever in entry.levers]),
        context_tokens=(lengths[1] - lengths[0]) / len(prompts),
        ms_per_token=ms_per_token,
    )
