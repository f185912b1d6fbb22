"""The search of `tune`: from places to cells to one that passes, on the validation split alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.divergence import summarize
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.evaluation.summary import mean
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job, Result
from trimtab.results import Progress
from trimtab.results.intervals import paired_bootstrap, spearman
from trimtab.results.journal import Notes
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import SLACK, Bounds, SweepRow, curve, sweep_row, window
from trimtab.strength.screen import Candidate, Odds, Screen, candidates, crossing
from trimtab.strength.sweep import NoStrengthPasses, Tried

SCREENED = 4  # prompts a side of the first look
SAMPLED, GLANCED = 7, 4  # places of which a few answers are read, prompts a side of that
FEW = 8  # prompts a side on which cells are answered before they are confirmed
ROUND = 3  # places refined and answered per round
SHARES = (0.55, 1.0)  # of the strength that meets the budget
BETWEEN = 0.75  # the share that is answered too where one of them is too weak, the other too strong
BACKED = (0.9, 0.8)  # of a strength that breaks the budget on all prompts, though not on a few
TOO_STRONG = ("damage", "coherence", "spill")  # see Bounds.failing
CONFIRMED = 2  # cells confirmed per round
LOOKED = 16  # prompts of the coarse look at damage
COARSE, FINE = (0.35, 0.6, 0.85, 1.1), (0.9, 1.08)  # of the strength found so far
CURVE = (0.45, 0.7, 1.0, 1.4, 2.5)  # of the chosen strength
STEPS = ROUND + 5  # of progress, when the first round has a cell that passes


class Search:
    """The state of one search.

    Attributes:
        bounds: what is asked for; a cell may miss the budget by `SLACK`.
        full: the validation split, `few` its first prompts.
        looked: every place, the best first; `tried` every cell answered, `passed` the chosen one's row.
        engine: does places and cells, which are independent within a step.
        job: this search, as a worker has it: the same prompts, nothing tried yet.
        calls_elsewhere: model calls of workers, what they build for themselves aside.
    """

    def __init__(
        self,
        lm: LanguageModel,
        validation: Behavior,
        vector: VectorSteering,
        bounds: Bounds,
        side: int,
        max_new_tokens: int,
        max_prompts: int | None,
        seed: int,
        progress: Progress | None = None,
        engine: Engine | None = None,
    ) -> None:
        make = partial(
            Search, validation=validation, vector=vector, bounds=bounds, side=side,
            max_new_tokens=max_new_tokens, max_prompts=max_prompts, seed=seed,
        )  # fmt: skip
        self.engine, self.job, self.calls_elsewhere = engine or Engine(lm), Job(self, make), 0
        self.lm, self.behavior, self.vector = lm, validation, vector
        self.bounds = replace(bounds, budget=bounds.budget * SLACK)
        self.budget, self.side, self.seed, self.progress = bounds.budget, side, seed, progress
        self.full = Evaluator(
            lm, validation, max_new_tokens=max_new_tokens, max_prompts=max_prompts,
            unsteered=Unsteered(lm, max_new_tokens, self.engine),
        )  # fmt: skip
        self.few, self.shown = self.full.first(FEW), self.full.damaged(side)
        self.odds = Odds(lm, validation, side)
        self.baseline = self.full.run(None, side)
        self.looked: list[Candidate] = []
        self.tried: list[Tried] = []
        self.passed: SweepRow = sweep_row(vector.at(0.0), self.baseline, seed)
        self.done = 0

    def step(self) -> None:
        """Tell the caller that one of the steps is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(STEPS, self.done + 3))

    def choose(
        self, layers: Sequence[Sequence[int]] | None, scopes: Sequence[str] | None
    ) -> VectorSteering:
        """Return the best cell that passes on the validation split, or refuse.

        Rounds continue down the list of places until a cell reaches the target, so that a poor cell
        that happens to pass does not end the search.
        """
        placed = candidates(self.lm, self.vector, layers, scopes)
        looked = self._spread(Search.look, [(vector,) for vector in placed])
        self.looked = sorted(looked, key=lambda c: -c.gain)
        self.step()
        hopeful = [c for c in self.looked if not c.refused and c.gain > 0][:SAMPLED]
        # A first token can turn while the answer continues as before, and late layers do just that: so
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
            # A cell that scores lower on a few prompts than a confirmed one on all is not worth the calls.
            likely = [t for t in passing if not best or t.row.score > best[0].row.score]
            measured = self._spread(Search.confirm, [(t,) for t in likely[:CONFIRMED]])
            confirmed = [tried for found in measured for tried in found]
            self.tried += confirmed
            best = sorted([*best, *(t for t in confirmed if t.verdict == "passed")], key=_rank)
            following = [promise[c] for c in order[start + ROUND :]]
            if best and (best[0].row.score >= self.bounds.target or not any(following)):
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
        return Screen(self.full.first(SCREENED), self.odds, self.budget, self.side)

    def look(self, vector: VectorSteering) -> Candidate:
        return self.screen.look(vector)

    def sample(self, candidate: Candidate) -> tuple[float, float]:
        """Return the strength that meets the budget, and the score of a handful of answers.

        The score is the mean over strengths up to that limit: a place that works at both strengths
        has a window. Broken text counts as 0.
        """
        vector = self.vector.select(layers=candidate.layers, scope=candidate.scope)
        limit = self.refine(vector, candidate.limit, COARSE, LOOKED)
        strengths = [self.side * limit * share for share in SHARES]
        results = self.full.first(GLANCED).run_many(vector, strengths, self.side)
        return limit, mean([result.sound_score(self.bounds.coherence) for result in results])

    def answer(self, candidate: Candidate, limit: float) -> list[Tried]:
        """Answer a few prompts at strengths up to the one that meets the budget."""
        vector = self.vector.select(layers=candidate.layers, scope=candidate.scope)
        limit = self.refine(vector, limit, FINE, len(self.full.prompts(self.shown)))

        def at(shares: Sequence[float]) -> list[Tried]:
            strengths = [self.side * limit * share for share in shares]
            return self.measured(self.few, vector, strengths, "screened")

        weak, strong = found = at(SHARES)
        if weak.verdict == "no gain" and strong.verdict in TOO_STRONG:
            found += at([BETWEEN])
        return found

    def refine(
        self, vector: VectorSteering, limit: float, factors: Sequence[float], prompts: int
    ) -> float:
        """Look again, on more prompts, at where p95 damage meets the budget."""
        strengths = [limit * factor for factor in factors]
        reference = self.full.first(prompts).reference(self.shown)
        many = reference.kl_many(vector, [self.side * m for m in strengths])
        return crossing(strengths, [summarize(t, self.seed).p95 for t in many], self.budget)

    def confirm(self, tried: Tried) -> list[Tried]:
        """Measure a cell on the whole validation split; back off where it breaks the budget there."""
        vector, found = self.place(tried), []
        for share in (1.0, *BACKED):
            found += self.measured(self.full, vector, [vector.strength * share], "confirmed")
            if found[-1].verdict != "damage":
                break
        return found

    def measured(
        self, evaluator: Evaluator, vector: VectorSteering, strengths: Sequence[float], stage: str
    ) -> list[Tried]:
        """Measure cells of one place and say what each of them fails by."""
        rows = curve(evaluator, vector, strengths, self.side, seed=self.seed)
        return [
            Tried(vector.layers, stage, self._failing(row, stage), row, str(vector.scope))
            for row in rows
        ]

    def _failing(self, row: SweepRow, stage: str) -> str:
        before = self.baseline.scores[: len(row.scores)]
        # A few prompts cannot show that a gain from a middling score is more than chance.
        low = row.score - mean(before)
        if stage == "confirmed":
            low, _ = paired_bootstrap(row.scores, before, self.seed)
        return self.bounds.failing(row) or ("passed" if low > 0 else "no gain")

    def curve(self, chosen: VectorSteering) -> tuple[SweepRow, ...]:
        """Measure the chosen place against strength."""
        strengths = [chosen.strength * factor for factor in CURVE]
        rows = curve(self.few, chosen, strengths, self.side, seed=self.seed)
        self.step()
        return tuple(rows)

    def gentler(self, chosen: VectorSteering, rows: Sequence[SweepRow]) -> VectorSteering:
        """Return the weakest strength of the curve that does as well, once confirmed; else the chosen.

        The search ends where the budget does; what is not needed there is only damage.
        """
        at = CURVE.index(1.0)
        for row in rows[:at]:
            if row.score >= rows[at].score and row.coherence >= self.bounds.coherence:
                place = Tried(chosen.layers, "screened", "passed", row, str(chosen.scope))
                confirmed = self.confirm(place)
                self.tried += confirmed
                tried = confirmed[-1]
                if tried.verdict == "passed" and tried.row.score >= self.passed.score:
                    self.passed = tried.row
                    return self.place(tried)
                break
        return chosen

    def window(self, rows: Sequence[SweepRow]) -> tuple[float, float] | None:
        """Return the strengths of a curve around the chosen one that pass at the target."""
        chosen = self.passed.strength  # confirmed on more prompts than the curve has
        known = [row for row in rows if row.strength != chosen]
        return window([*known, self.passed], self.bounds, chosen)

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
            f"{t.row.score:.2f}, coherence {t.row.coherence:.2f}, p95 damage (on-target KL) {t.row.damage_p95:.2f} "
            f"({t.verdict})"
            for t in closest
        )
        steered = [c.gain for c in self.looked if not c.refused]
        if cells:
            best = f"the closest: {cells}"
        elif steered:
            best = f"no place moves the readout ({max(steered):+.2f} nats at most)"
        else:
            best = f"no place can be steered ({self.looked[0].refused})"
        return NoStrengthPasses(
            asked=f"a strength that moves {self.behavior.name!r} {side} from a score of "
            f"{before.score:.2f} within {self.budget:g} nats of damage (on-target KL) at a coherence of "
            f"{self.bounds.coherence:g}",
            found=f"no strength passes: {found}; {best}",
            advice="try another method of find, other layers or scopes, or a larger budget",
            baseline=before,
            tried=tuple(self.tried),
        )


def _counted(
    do: Callable[..., Result], arguments: tuple[Any, ...], search: Search, notes: Notes
) -> tuple[Result, int]:
    """What a method returns, and the model calls that it took."""
    with counting(search.lm) as calls:
        return do(search, *arguments), calls.rows


def _rank(tried: Tried) -> tuple[bool, float, float]:
    return tried.verdict != "passed", -tried.row.score, tried.row.damage_p95
