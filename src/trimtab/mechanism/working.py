"""The strength at which a steering is explained: its own, or the weakest that moves the behavior.

A vector that moves nothing at its own strength (as found, m = 1 is a norm and no promise) has
nothing to explain there. Its answers are judged at multiples of that strength, on prompts that are
not scored later, and the weakest that does nearly as well as the best is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean
from trimtab.mechanism.case import Case
from trimtab.results.tables import Printable, Table, number

LEAST_GAIN = 0.2  # of the score; a steering that gains less has little to lose
NEARLY = 0.9  # of the best gain
# A quarter, for a strength beyond the cliff, to 32 times, for one of a unit that promises nothing.
FACTORS = tuple(2 ** (half / 2) for half in range(-4, 11) if half)


@dataclass(frozen=True)
class WorkingRow:
    """A strength m, and the mean of the judge's score times coherence: gibberish moves nothing."""

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
    tried: tuple[WorkingRow, ...]
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


def working_strength(case: Case, *, look: bool = True) -> Working:
    """Judge a vector at its own strength and, where that moves nothing, at 1/4 to 32 times it.

    The prompts are those of the validation split, which are not scored later; the sign of the
    strength says which way. Without `look` no other strength than its own is tried.
    """
    sign = 1 if case.vector.strength > 0 else -1
    evaluator = Evaluator(
        case.lm,
        case.splits.validation,
        max_new_tokens=case.max_new_tokens,
        max_prompts=case.max_prompts,
        judge=case.judge,
        coherence=case.coherence,
    )
    prompts = evaluator.prompts(evaluator.scored(sign))

    def scores(strengths: Sequence[float]) -> dict[float, float]:
        """Return m -> score; that of the unsteered model, m = 0, among them."""
        return {
            m: mean([answer.sound(sign) for answer in evaluator.judged(prompts, answers)])
            for m, answers in evaluator.answers(case.vector, strengths, sign).items()
        }

    own = case.vector.strength
    found = scores([own])
    unsteered = found[0.0]
    tried = [WorkingRow(own, found[own])]
    if look and tried[0].score - unsteered < LEAST_GAIN:
        strengths = [own * factor for factor in FACTORS]
        found = scores(strengths)
        tried += [WorkingRow(m, found[m]) for m in strengths]
    best = max(one.score for one in tried) - unsteered
    used = own
    if best >= LEAST_GAIN:
        near = [one.strength for one in tried if one.score - unsteered >= NEARLY * best]
        used = min(near, key=abs)
    return Working(own, used, unsteered, tuple(tried), len(prompts))
