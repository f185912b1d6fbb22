"""One lever, one sign: its answers scored, and its damage and spill along unsteered answers.

Which prompts are which (DESIGN, damage and spill):

| | m > 0 | m < 0 |
|---|---|---|
| scored | away prompts, share of verdicts toward | toward prompts, share of verdicts away |
| scored, if there are any | requests, share toward | requests, share away |
| damage | toward prompts | away prompts |
| spill | neutral prompts | neutral prompts |

A behavior has `requests`, prompts that call for neither side, when its away prompts demand the
opposite in so many words: steering is then asked to decide, not to contradict.
Unsteered answers and their tokens are made once per `Evaluator` and shared by all levers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import Coherence, coherence_for
from trimtab.evaluation.divergence import Divergence, Reference, summarize
from trimtab.evaluation.judges import Judge, Verdict, judge_for
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.steering.vector import Switch, VectorSteering


@dataclass(frozen=True)
class Sample:
    """One prompt with the unsteered and the steered answer."""

    prompt: str | list[dict[str, str]]
    before: str
    after: str


@dataclass(frozen=True)
class Evaluation:
    """What one lever did; every tuple has one entry per scored prompt, in order.

    Attributes:
        sign: +1 scored toward, -1 away.
        scores: verdicts on the wanted side.
        coherences: of the same answers.
        damage_tokens: per-token KL, one tensor per prompt that already shows the behavior.
        spill_tokens: the same on neutral prompts; None without neutral prompts.
        samples: prompt, unsteered answer and steered answer.
    """

    sign: int
    scores: tuple[float, ...]
    coherences: tuple[float, ...]
    damage_tokens: tuple[torch.Tensor, ...]
    spill_tokens: tuple[torch.Tensor, ...] | None
    samples: tuple[Sample, ...]

    def sound_score(self, floor: float) -> float:
        """Return the mean score; 0 where the mean coherence is below a floor."""
        sound = sum(self.coherences) / len(self.coherences) >= floor
        return sum(self.scores) / len(self.scores) * sound

    def damage(self, seed: int) -> Divergence:
        """Summarize the damage."""
        return summarize(self.damage_tokens, seed)

    def spill(self, seed: int) -> Divergence | None:
        """Summarize the spill; None without neutral prompts."""
        return None if self.spill_tokens is None else summarize(self.spill_tokens, seed)


@dataclass(frozen=True)
class JudgedAnswer(Verdict):
    """How far an answer shows the behavior and how far its opposite, and whether it is sound text.

    `share(sign)` is the score that every table reports.
    """

    coherence: float

    def sound(self, sign: int) -> float:
        """Return the score times coherence, for a search that must not follow gibberish."""
        return self.share(sign) * self.coherence


class Unsteered:
    """The unsteered greedy answers of one model, each generated once, for any number of evaluators."""

    def __init__(
        self, lm: LanguageModel, max_new_tokens: int = 40, engine: Engine | None = None
    ) -> None:
        self.lm, self.max_new_tokens = lm, max_new_tokens
        self.engine = engine or Engine(lm)
        self._known: dict[str, str] = {}

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return one answer per prompt; only those not asked before are generated."""
        asked = {json.dumps(prompt): prompt for prompt in prompts}
        new = {key: prompt for key, prompt in asked.items() if key not in self._known}
        if new:
            found = self.engine.answer(None, list(new.values()), self.max_new_tokens)
            self._known.update(zip(new, found, strict=True))
        return [self._known[json.dumps(prompt)] for prompt in prompts]


class Evaluator:
    """Runs levers on one behavior's prompts."""

    def __init__(
        self,
        lm: LanguageModel,
        behavior: Behavior,
        *,
        max_new_tokens: int = 40,
        max_prompts: int | None = None,
        unsteered: Unsteered | None = None,
        engine: Engine | None = None,
        judge: Judge | None = None,
        coherence: Coherence | None = None,
    ) -> None:
        """Build the judge and the coherence scorer where none is given; nothing is run yet.

        Args:
            lm: the unsteered model.
            behavior: the split whose prompts are used, all of them or the first `max_prompts` a side.
            max_new_tokens: length of answers.
            max_prompts: see `behavior`.
            unsteered: answers shared with other evaluators of this model at this length.
            engine: writes the answers; that of `unsteered`, or this process, by default.
            judge: one that was built already.
            coherence: likewise.
        """
        if max_new_tokens < 1 or (max_prompts is not None and max_prompts < 1):
            raise TrimtabError(
                asked=f"answers of {max_new_tokens} tokens to {max_prompts} prompts",
                found="a count below 1",
                advice="use at least one token and one prompt",
            )
        self.lm, self.behavior = lm, behavior
        self.max_new_tokens, self.max_prompts = max_new_tokens, max_prompts
        self._judge = judge or judge_for(behavior)
        self._coherence = coherence or coherence_for(behavior)
        self.known = unsteered or Unsteered(lm, max_new_tokens, engine)
        self.engine = engine or self.known.engine
        if (self.known.lm, self.known.max_new_tokens) != (lm, max_new_tokens):
            raise TrimtabError(
                asked="to share unsteered answers",
                found="answers of another model or another length",
                advice="make Unsteered(lm, max_new_tokens) with the same two",
            )
        self._references: dict[str, Reference] = {}
        self._first: dict[int, Evaluator] = {}

    def first(self, prompts: int) -> Evaluator:
        """Return the same with at most so many prompts a side; nothing is judged or answered again.

        What it reads is kept, so that a second look at as many prompts costs less.
        """
        if self.max_prompts is not None and prompts >= self.max_prompts:
            return self
        if prompts not in self._first:
            few = copy(self)
            few.max_prompts, few._references, few._first = prompts, {}, {}
            self._first[prompts] = few
        return self._first[prompts]

    def prompts(self, side: str) -> list[Prompt]:
        """Return the prompts of the side `toward`, `away`, `neutral` or `requests`.

        Raises:
            TrimtabError: when toward or away has none.
        """
        chosen = [example.prompt for example in getattr(self.behavior, side)[: self.max_prompts]]
        if not chosen and side in ("toward", "away"):
            raise TrimtabError(
                asked=f"to measure the behavior {self.behavior.name!r}",
                found=f"no {side} prompt in this split",
                advice="give it more examples, or measure with split=None",
            )
        return chosen

    def scored(self, sign: int) -> str:
        """Return the side whose answers are scored for a strength of this sign."""
        if self.behavior.requests:
            return "requests"
        return "away" if sign > 0 else "toward"

    def damaged(self, sign: int) -> str:
        """Return the side that already shows the behavior, along whose answers damage is read."""
        return "toward" if sign > 0 else "away"

    def unsteered(self, side: str) -> list[str]:
        """Return the unsteered greedy answers of a side, generated once."""
        return self.known.answers(self.prompts(side))

    def answers(
        self, vector: VectorSteering, strengths: Sequence[float], sign: int
    ) -> dict[float, list[str]]:
        """Return the greedy answers to the scored prompts at each strength, generated together."""
        scored = self.scored(sign)
        found, moving = {0.0: self.unsteered(scored)}, sorted({float(m) for m in strengths} - {0.0})
        if moving:
            said = self.engine.rollout(vector, self.prompts(scored), moving, self.max_new_tokens)
            found |= dict(zip(moving, said, strict=True))
        return found

    def reference(self, side: str) -> Reference:
        """Return a side's prompts with their unsteered answers, read once, to measure KL along."""
        if side not in self._references:
            self._references[side] = Reference(self.lm, self.prompts(side), self.unsteered(side))
        return self._references[side]

    def judged(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[JudgedAnswer]:
        """Judge answers, however they were made: one result per answer, in order."""
        verdicts, coherences = self._judge(prompts, answers), self._coherence(answers)
        return [
            JudgedAnswer(verdict.toward, verdict.away, coherence)
            for verdict, coherence in zip(verdicts, coherences, strict=True)
        ]

    def run(self, lever: Switch | LanguageModel | None, sign: int) -> Evaluation:
        """Score a lever, a second model (checkpoint) or, for None, the unsteered model itself."""
        scored = self.scored(sign)
        prompts, answers = self.prompts(scored), self.unsteered(scored)
        if isinstance(lever, LanguageModel):
            answers = lever.generate(list(prompts), max_new_tokens=self.max_new_tokens)
        elif lever is not None:
            answers = self.engine.answer(lever, prompts, self.max_new_tokens)
        spilled = self._kl(lever, "neutral") if self.prompts("neutral") else None
        damage = self._kl(lever, self.damaged(sign))
        return self.evaluation(sign, answers, damage, spilled)

    def run_many(
        self, vector: VectorSteering, strengths: Sequence[float], sign: int
    ) -> list[Evaluation]:
        """Score a vector at every strength; equal to `run(vector.at(m), sign)` one by one.

        Answers are generated for all strengths together (`trimtab.passes.rollout`), and what no strength
        changes is read once (`trimtab.passes.fan`).
        """
        answers = self.answers(vector, strengths, sign)
        each = sorted(answers)

        def kl(side: str) -> dict[float, list[torch.Tensor]]:
            return dict(zip(each, self.reference(side).kl_many(vector, each), strict=True))

        damage = kl(self.damaged(sign))
        spill = kl("neutral") if self.prompts("neutral") else {}
        return [
            self.evaluation(sign, answers[m], damage[m], spill[m] if spill else None)
            for m in map(float, strengths)
        ]

    def evaluation(
        self,
        sign: int,
        answers: Sequence[str],
        damage: Sequence[torch.Tensor],
        spill: Sequence[torch.Tensor] | None = None,
    ) -> Evaluation:
        """Judge answers to the scored prompts, however they were made, beside damage and spill."""
        scored = self.scored(sign)
        prompts, before = self.prompts(scored), self.unsteered(scored)
        judged = self.judged(prompts, answers)
        return Evaluation(
            sign=sign,
            scores=tuple(answer.share(sign) for answer in judged),
            coherences=tuple(answer.coherence for answer in judged),
            damage_tokens=tuple(damage),
            spill_tokens=None if spill is None else tuple(spill),
            samples=tuple(
                Sample(p if isinstance(p, str) else [dict(m) for m in p], b, a)
                for p, b, a in zip(prompts, before, answers, strict=True)
            ),
        )

    def _kl(self, lever: Switch | LanguageModel | None, side: str) -> list[torch.Tensor]:
        reference = self.reference(side)
        if lever is None:  # the unsteered model does not differ from itself
            return reference.zeros()
        if isinstance(lever, LanguageModel):
            return reference.kl(other=lever)
        return reference.kl(lever)
