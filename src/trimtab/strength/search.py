"""The search of `tune`: from places to cells to one that passes, on the validation split alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from trimtab.evaluation.divergence import Reference, summarize
from trimtab.evaluation.evaluate import Evaluation, Evaluator, Unsteered
from trimtab.evaluation.summary import mean
from trimtab.passes.calls import counting
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job, Result
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap, spearman
from trimtab.results.journal import Notes
from trimtab.steering.vector import VectorSteering
from trimtab.strength.choose import NoStrengthPasses, Tried
from trimtab.strength.screen import Candidate, Odds, Screen, candidates, crossing
from trimtab.strength.sweep import SweepRow, sweep_row

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.model import LanguageModel

SCREENED = 4  # prompts a side of the first look
SAMPLED, GLANCED = 7, 4  # places of which a few answers are read, prompts a side of that
FEW = 8  # prompts a side on which cells are answered before they are confirmed
ROUND = 3  # places refined and answered per round
SHARES = (0.55, 1.0)  # of the strength that meets the budget
BETWEEN = 0.75  # the share that is answered too where one of them is too weak, the other too strong
BACKED = (0.9, 0.8)  # of a strength that breaks the budget on all prompts, though not on a few
TOO_STRONG = ("damage", "coherence", "spill")
CONFIRMED = 2  # cells confirmed per round
LOOKED = 16  # prompts of the coarse look at damage
COARSE, FINE = (0.35, 0.6, 0.85, 1.1), (0.9, 1.08)  # of the strength found so far
CURVE = (0.45, 0.7, 1.0, 1.4, 2.5)  # of the chosen strength
SLACK = 1.02  # the strength is solved for to a few per cent of damage
STEPS = ROUND + 5  # of progress, when the first round has a cell that passes


class Search:
    """The state of one search.

    Attributes:
        side: +1 or -1.
        full: the validation split, `few` and `glance` its first prompts.
        odds: reads the behavior off logits.
        known: unsteered answers.
        looked: every place, the best first.
        references: unsteered answers that damage is read along, by number of prompts.
        tried: every cell answered.
        passed: the chosen cell's row.
        engine: does places and cells, which are independent within a step.
        job: this search, as a worker has it: the same prompts, nothing tried yet.
        calls_elsewhere: model calls of workers, what they build for themselves aside.
    """

    def __init__(
        self,
        lm: LanguageModel,
        validation: Behavior,
        vector: VectorSteering,
        budget: float,
        side: int,
        spill_budget: float | None,
        floor: float,
        max_new_tokens: int,
        max_prompts: int | None,
        seed: int,
        progress: Progress | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Build the evaluators and answer the validation prompts unsteered."""
        make = partial(
            Search, validation=validation, vector=vector, budget=budget, side=side,
            spill_budget=spill_budget, floor=floor, max_new_tokens=max_new_tokens,
            max_prompts=max_prompts, seed=seed,
        )  # fmt: skip
        self.engine, self.job, self.calls_elsewhere = engine or Engine(lm), Job(self, make), 0
        self.lm, self.behavior, self.vector = lm, validation, vector
        self.budget, self.side, self.spill_budget = budget, side, spill_budget
        self.floor, self.seed, self.progress = floor, seed, progress
        self.known = Unsteered(lm, max_new_tokens, self.engine)

        def evaluator(most: int | None) -> Evaluator:
            cap = most if max_prompts is None else min(max_prompts, most or max_prompts)
            return Evaluator(
                lm,
                validation,
                max_new_tokens=max_new_tokens,
                max_prompts=cap,
                unsteered=self.known,
            )

        self.full, self.few, self.glance = evaluator(None), evaluator(FEW), evaluator(GLANCED)
        self.odds = Odds(lm, validation, side)
        self.baseline = self.full.run(None, side)
        self.looked: list[Candidate] = []
        self.references: dict[int, Reference] = {}
        self.tried: list[Tried] = []
        self.passed: SweepRow = sweep_row(vector.at(0.0), self.baseline, seed)
        self.done = 0

    def step(self) -> None:
        """Tell the caller that one of the steps is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(STEPS, self.done + 3))

    def choose(
        self, layers: Sequence[Sequence[int]] | None, scopes: Sequence[str] | None, target: float
    ) -> VectorSteering:
        """Return the best cell that passes on the validation split, or refuse.

        Rounds go on down the list of places until a cell reaches the target, so that a poor cell
        that happens to pass does not end the search.
        """
        placed = candidates(self.lm, self.vector, layers, scopes)
        looked = self._spread(Search.look, [(vector,) for vector in placed])
        self.looked = sorted(looked, key=lambda c: -c.gain)
        self.step()
        hopeful = [c for c in self.looked if not c.refused and c.gain > 0][:SAMPLED]
        # A first token can turn while the answer goes on as before, and late layers do just that: so
        # whole answers decide which places are worth the calls.
        sampled = self._spread(Search.sample, [(c,) for c in hopeful])
        limits = {c: limit for c, (limit, _) in zip(hopeful, sampled, strict=True)}
        promise = {c: score for c, (_, score) in zip(hopeful, sampled, strict=True)}
        order = sorted(hopeful, key=lambda c: -promise[c])
        self.step()
        best: list[Tried] = []
        for start in range(0, len(order), ROUND):
            places = order[start : start + ROUND]
            answered = self._spread(Search.answer, [(c, limits[c]) for c in places], self.step)
            cells = [tried for found in answered for tried in found]
            self.tried += cells
            passing = sorted((t for t in cells if t.verdict == "passed"), key=_rank)
            # What few prompts put below a cell that all prompts confirmed is not worth the calls.
            likely = [t for t in passing if not best or t.row.score > best[0].row.score]
            measured = self._spread(Search.confirm, [(t,) for t in likely[:CONFIRMED]])
            confirmed = [tried for found in measured for tried in found]
            self.tried += confirmed
            best = sorted([*best, *(t for t in confirmed if t.verdict == "passed")], key=_rank)
            following = [promise[c] for c in order[start + ROUND :]]
            if best and (best[0].row.score >= target or not any(following)):
                break
        if best:
            self.passed = best[0].row
            return self.place(best[0])
        raise self.refusal("no cell passes")

    def place(self, tried: Tried) -> VectorSteering:
        """Return the vector of a cell."""
        row = tried.row
        return self.vector.select(layers=tried.layers, scope=tried.scope, strength=row.strength)

    def _spread(
        self,
        do: Callable[..., Result],
        asked: Sequence[tuple[Any, ...]],
        step: Callable[[], None] | None = None,
    ) -> list[Result]:
        """Call a method of a search with each of the arguments, wherever the engine does it."""
        units = [partial(_counted, do, arguments) for arguments in asked]

        def done(number: int, found: tuple[Result, int]) -> None:
            self.calls_elsewhere += found[1] if self.engine.elsewhere else 0
            if step is not None:
                step()

        return [result for result, _ in self.engine.map(self.job, units, done=done)]

    @cached_property
    def screen(self) -> Screen:
        """The first look, whose prompts are read once."""
        shown = "toward" if self.side > 0 else "away"
        return Screen(
            self.lm,
            self.odds,
            self.full.prompts(self.full.scored(self.side))[:SCREENED],
            self.full.prompts(shown)[:SCREENED],
            self.full.unsteered(shown)[:SCREENED],
            self.budget,
            self.side,
        )

    def look(self, vector: VectorSteering) -> Candidate:
        """Look at one place."""
        return self.screen.look(vector)

    def sample(self, candidate: Candidate) -> tuple[float, float]:
        """Return the strength that meets the budget, and the score of a handful of answers.

        The score is the mean over strengths up to that limit: a place that works at both strengths
        has a window. Broken text counts as 0.
        """
        vector = self.vector.select(layers=candidate.layers, scope=candidate.scope)
        limit = self.refine(vector, candidate.limit, COARSE, LOOKED)
        strengths = [self.side * limit * share for share in SHARES]
        results = self.glance.run_many(vector, strengths, self.side)
        return limit, mean([mean(r.scores) * (mean(r.coherences) >= self.floor) for r in results])

    def answer(self, candidate: Candidate, limit: float) -> list[Tried]:
        """Answer a few prompts at strengths up to the one that meets the budget."""
        vector = self.vector.select(layers=candidate.layers, scope=candidate.scope)
        prompts = len(self.full.prompts("toward" if self.side > 0 else "away"))
        limit = self.refine(vector, limit, FINE, prompts)

        def at(shares: Sequence[float]) -> list[Tried]:
            strengths = [self.side * limit * share for share in shares]
            results = self.few.run_many(vector, strengths, self.side)
            return [
                self._judged(vector.at(m), result, "screened")
                for m, result in zip(strengths, results, strict=True)
            ]

        weak, strong = found = at(SHARES)
        if weak.verdict == "no gain" and strong.verdict in TOO_STRONG:
            found += at([BETWEEN])
        return found

    def refine(
        self, vector: VectorSteering, limit: float, factors: Sequence[float], prompts: int
    ) -> float:
        """Look again, on more prompts, at where p95 damage meets the budget."""
        if prompts not in self.references:
            shown = "toward" if self.side > 0 else "away"
            listed, answers = self.full.prompts(shown), self.full.unsteered(shown)
            self.references[prompts] = Reference(self.lm, listed[:prompts], answers[:prompts])
        strengths = [limit * factor for factor in factors]
        many = self.references[prompts].kl_many(vector, [self.side * m for m in strengths])
        return crossing(strengths, [summarize(t, self.seed).p95 for t in many], self.budget)

    def confirm(self, tried: Tried) -> list[Tried]:
        """Measure a cell on the whole validation split; back off where it breaks the budget there."""
        vector, found = self.place(tried), []
        for share in (1.0, *BACKED):
            at = vector.at(vector.strength * share)
            (result,) = self.full.run_many(at, [at.strength], self.side)
            found.append(self._judged(at, result, "confirmed"))
            if found[-1].verdict != "damage":
                break
        return found

    def _judged(self, vector: VectorSteering, result: Evaluation, stage: str) -> Tried:
        row = replace(sweep_row(vector, result, self.seed), samples=())
        verdict = self._failing(row, result, stage) or "passed"
        return Tried(vector.layers, stage, verdict, row, str(vector.scope))

    def _failing(self, row: SweepRow, result: Evaluation, stage: str) -> str:
        if row.coherence < self.floor:
            return "coherence"
        if row.damage_p95 > self.budget * SLACK:
            return "damage"
        spilled = row.spill_p95
        if self.spill_budget is not None and spilled is not None and spilled > self.spill_budget:
            return "spill"
        before = self.baseline.scores[: len(result.scores)]
        # A few prompts cannot show that a gain from a middling score is more than chance.
        low = mean(result.scores) - mean(before)
        if stage == "confirmed":
            low, _ = paired_bootstrap(result.scores, before, self.seed)
        return "" if low > 0 else "no gain"

    def curve(self, chosen: VectorSteering) -> tuple[SweepRow, ...]:
        """Measure the chosen place against strength."""
        strengths = [chosen.strength * factor for factor in CURVE]
        results = self.few.run_many(chosen, strengths, self.side)
        self.step()
        return tuple(
            replace(sweep_row(chosen.at(m), result, self.seed), samples=())
            for m, result in zip(strengths, results, strict=True)
        )

    def gentler(self, chosen: VectorSteering, rows: Sequence[SweepRow]) -> VectorSteering:
        """Return the weakest strength of the curve that does as well, once confirmed; else the chosen.

        The search ends where the budget does; what is not needed there is only damage.
        """
        at = CURVE.index(1.0)
        for row in rows[:at]:
            if row.score >= rows[at].score and row.coherence >= self.floor:
                place = Tried(chosen.layers, "screened", "passed", row, str(chosen.scope))
                confirmed = self.confirm(place)
                self.tried += confirmed
                tried = confirmed[-1]
                if tried.verdict == "passed" and tried.row.score >= self.passed.score:
                    self.passed = tried.row
                    return self.place(tried)
                break
        return chosen

    def window(self, rows: Sequence[SweepRow], target: float) -> tuple[float, float] | None:
        """Return the ends of the run of strengths around the chosen one that pass at the target."""
        inside = [
            row.score >= target
            and row.coherence >= self.floor
            and row.damage_p95 <= self.budget * SLACK
            for row in rows
        ]
        at = next(i for i, row in enumerate(rows) if row.strength == self.passed.strength)
        inside[at] = self.passed.score >= target  # confirmed on more prompts than the curve has
        if not inside[at]:
            return None
        first, last = at, at
        while first > 0 and inside[first - 1]:
            first -= 1
        while last + 1 < len(rows) and inside[last + 1]:
            last += 1
        ends = sorted((rows[first].strength, rows[last].strength))
        return ends[0], ends[1]

    def damage_coherence(self, curve: Sequence[SweepRow]) -> float:
        """Return the rank correlation over every cell that was answered."""
        rows = [t.row for t in self.tried if t.stage == "screened"] + list(curve)
        return spearman([r.damage_p95 for r in rows], [r.coherence for r in rows])

    def refusal(self, found: str) -> NoStrengthPasses:
        """Say that nothing passes, with the cells that came closest."""
        side = "toward" if self.side > 0 else "away"
        before = sweep_row(self.vector.at(0.0), self.baseline, self.seed)
        closest = sorted(self.tried, key=_rank)[:3]
        cells = "; ".join(
            f"layers {', '.join(map(str, t.layers))} at m = {t.row.strength:+.3g}: score "
            f"{t.row.score:.2f}, coherence {t.row.coherence:.2f}, p95 damage {t.row.damage_p95:.2f} "
            f"({t.verdict})"
            for t in closest
        )
        best = f"; the closest: {cells}" if cells else f"; {self._immobile()}"
        return NoStrengthPasses(
            asked=f"a strength that moves {self.behavior.name!r} {side} from a score of "
            f"{before.score:.2f} within {self.budget:g} nats of damage at a coherence of "
            f"{self.floor:g}",
            found=f"no strength passes: {found}{best}",
            advice="try another method of find, other layers or scopes, or a larger budget",
            baseline=before,
            tried=tuple(self.tried),
        )

    def _immobile(self) -> str:
        """Why no place was worth an answer."""
        steered = [c.gain for c in self.looked if not c.refused]
        if steered:
            return f"no place moves the readout ({max(steered):+.2f} nats at most)"
        return f"no place can be steered ({self.looked[0].refused})"


def _counted(
    do: Callable[..., Result], arguments: tuple[Any, ...], search: Search, notes: Notes
) -> tuple[Result, int]:
    """What a method returns, and the model calls that it took."""
    with counting(search.lm) as calls:
        return do(search, *arguments), calls.rows


def _rank(tried: Tried) -> tuple[bool, float, float]:
    return tried.verdict != "passed", -tried.row.score, tried.row.damage_p95
