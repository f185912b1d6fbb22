"""Where and how hard each lever is used under one budget: layer and strength, on validation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator
from trimtab.levers.conversions.ablation import ablating
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.teacher import switched
from trimtab.steering.together import Together
from trimtab.steering.vector import Switch, VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.strength.core import Bounds
from trimtab.strength.place import PUSHES, Placed, longest, place
from trimtab.strength.screen import Odds, Screen, candidates

SCREENED, GLANCED, ROUGH = 4, 8, 16  # prompts of the first look, of the glance, of the rough damage
PLACES = 4  # whose answers are read
AMPLIFIED = 16.0  # most shares of a direction that are put on top of what is there


@dataclass(eq=False)
class Bench:
    """The validation split of one behavior under one budget, in nats per token, 95th percentile."""

    lm: LanguageModel
    validation: Evaluator
    budget: float
    sign: int
    seed: int = 0

    @property
    def shown(self) -> str:
        """The side that already shows the behavior, along whose answers damage is read."""
        return self.validation.damaged(self.sign)

    @cached_property
    def odds(self) -> Odds:
        """Reads the behavior off logits."""
        return Odds(self.lm, self.validation.behavior, self.sign)

    def place(
        self,
        lever: VectorSteering | WeightSteering | Together,
        prompts: int | None = None,
        **how: Any,
    ) -> Placed:
        """Put a lever at the largest strength that keeps the budget on all, or the first few, prompts."""
        every = len(self.validation.prompts(self.shown))
        reference = self.validation.first(min(prompts or every, every)).reference(self.shown)
        how = {"sign": self.sign, "seed": self.seed, **how}
        return place(reference, lever, self.budget, **how)

    def moved(self, lever: Switch) -> float:
        """Return the mean log-odds of the wanted words under a lever, nats."""
        prompts = self.validation.prompts(self.validation.scored(self.sign))
        with switched(self.lm, lever):
            return float(self.odds(self.lm.next_logits(prompts)).mean())


def settle_vector(
    bench: Bench, vectors: Sequence[VectorSteering], scope: str
) -> tuple[VectorSteering, Placed]:
    """Choose the vector and the layers of one scope, and the strength that keeps the budget.

    Every place is screened by its readout (strength/screen.py); at the best few, prompts are
    answered at the strength that keeps the budget, and the place whose sound answers show the
    behavior most often is taken.

    Raises:
        TrimtabError: no place can be steered.
    """
    screen = Screen(bench.validation.first(SCREENED), bench.odds, bench.budget, bench.sign)
    seen: list[tuple[float, VectorSteering]] = []
    refused = "no vector"
    for vector in vectors:
        for c in map(screen.look, candidates(bench.lm, vector, None, [scope])):
            refused = c.refused or refused
            if not c.refused:
                at = vector.select(layers=c.layers, scope=scope, strength=max(c.limit, 1e-3))
                seen.append((c.gain, at))
    if not seen:
        raise TrimtabError(f"a vector with scope {scope}", refused, "use another scope")
    seen.sort(key=lambda pair: -pair[0])
    glance = bench.validation.first(GLANCED)
    best: tuple[float, float, VectorSteering] | None = None
    for gain, vector in seen[:PLACES]:
        rough = bench.place(vector, ROUGH)
        (result,) = glance.run_many(vector, [rough.strength], bench.sign)
        score = result.sound_score(Bounds().coherence)
        if best is None or (score, gain) > best[:2]:
            best = (score, gain, vector.at(abs(rough.strength) or vector.strength))
    assert best is not None  # something was seen
    placed = bench.place(best[2])
    return best[2].at(placed.strength), placed


def settle_update(
    bench: Bench, update: WeightSteering, largest: float
) -> tuple[WeightSteering, Placed]:
    """Put a low-rank update at the largest strength that keeps the budget."""
    side = -1 if update.strength < 0 else 1
    placed = bench.place(update, largest=largest, sign=side)
    return update.at(placed.strength), placed


def settle_ablation(bench: Bench, vector: VectorSteering) -> tuple[Together, Placed]:
    """Take a direction out (m up to 1) or put more of it in (m below 0), whichever moves more.

    Which of the two is chosen by the mean log-odds of the wanted words on validation prompts.
    """
    layer = vector.layers[-1]
    lever = ablating(vector, layer)
    found: list[tuple[float, Together, Placed]] = []
    for side, largest in ((1, 1.0), (-1, AMPLIFIED)):
        placed = bench.place(lever, first=0.25, largest=largest, sign=side)
        at = lever.at(placed.strength)
        found.append((bench.moved(at), at, placed))
    _, chosen, placed = max(found, key=lambda item: item[0])
    return chosen, placed


def reach(vector: VectorSteering) -> float:
    """Return the largest strength of what is made from a vector in its own units."""
    return max(longest(vector), PUSHES * abs(vector.strength))
