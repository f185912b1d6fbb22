"""The strength at which a steering is explained: its own, or the weakest that moves the behavior.

A vector that moves nothing at its own strength (as found, m = 1 is a norm and no promise) has
nothing to explain there. Its answers are judged at multiples of that strength, on prompts that are
not scored later, and the weakest that does nearly as well as the best is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean
from trimtab.results.tables import Printable, Table, number

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.model import LanguageModel
    from trimtab.steering.vector import VectorSteering

LEAST_GAIN = 0.2  # of the score; a steering that gains less has little to lose
NEARLY = 0.9  # of the best gain
# A quarter, for a strength beyond the cliff, to 32 times, for one of a unit that promises nothing.
FACTORS = tuple(2 ** (half / 2) for half in range(-4, 11) if half)


@dataclass(frozen=True)
class Tried:
    """One strength.

    Attributes:
        strength: m.
        score: mean of the judge's score times coherence, 0 to 1: gibberish moves nothing.
    """

    strength: float
    score: float


@dataclass(frozen=True)
class Working(Printable):
    """Which strength is explained, and why.

    Attributes:
        given: the vector's own m.
        used: the m that is explained.
        unsteered: score of the unsteered model on the same prompts.
        tried: every strength that was judged, the own one first.
        prompts: how many were answered.
    """

    given: float
    used: float
    unsteered: float
    tried: tuple[Tried, ...]
    prompts: int

    @property
    def gain(self) -> float:
        """What the used strength gains over the unsteered model, of 1."""
        return next(one.score for one in self.tried if one.strength == self.used) - self.unsteered

    @property
    def moves(self) -> bool:
        """Whether the used strength moves the behavior."""
        return self.gain >= LEAST_GAIN

    def table(self) -> Table:
        """Return the score at every strength that was tried."""
        rows = tuple((f"{one.strength:+g}", number(one.score)) for one in self.tried)
        note = f"score times coherence of {self.prompts} prompts; explained: m = {self.used:+g}"
        return Table(
            "Which strength is explained",
            ("m", "score"),
            (("0", number(self.unsteered)), *rows),
            (note,),
        )


def working_strength(
    lm: LanguageModel,
    split: Behavior,
    vector: VectorSteering,
    *,
    max_prompts: int = 16,
    max_new_tokens: int = 24,
    look: bool = True,
) -> Working:
    """Judge a vector at its own strength and, where that moves nothing, at 1/4 to 32 times it.

    Args:
        lm: the unsteered model.
        split: the prompts to look at; not those that are scored later.
        vector: an additive steering; the sign of its strength says which way.
        max_prompts: at most so many.
        max_new_tokens: length of answers.
        look: whether other strengths than its own are tried.

    Raises:
        TrimtabError: a split without prompts, or a behavior without a judge.
    """
    sign = 1 if vector.strength > 0 else -1
    evaluator = Evaluator(lm, split, max_new_tokens=max_new_tokens, max_prompts=max_prompts)
    prompts = evaluator.prompts(evaluator.scored(sign))

    def scores(strengths: Sequence[float]) -> dict[float, float]:
        """Return m -> score; that of the unsteered model, m = 0, among them."""
        return {
            m: mean([answer.sound(sign) for answer in evaluator.judged(prompts, answers)])
            for m, answers in evaluator.answers(vector, strengths, sign).items()
        }

    own = vector.strength
    found = scores([own])
    unsteered = found[0.0]
    tried = [Tried(own, found[own])]
    if look and tried[0].score - unsteered < LEAST_GAIN:
        strengths = [own * factor for factor in FACTORS]
        found = scores(strengths)
        tried += [Tried(m, found[m]) for m in strengths]
    best = max(one.score for one in tried) - unsteered
    used = own
    if best >= LEAST_GAIN:
        near = [one.strength for one in tried if one.score - unsteered >= NEARLY * best]
        used = min(near, key=abs)
    return Working(own, used, unsteered, tuple(tried), len(prompts))
