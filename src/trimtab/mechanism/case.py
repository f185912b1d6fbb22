"""What every part of an explanation needs, prepared once and handed down.

Nothing is prepared before a part asks for it: a behavior without a judge still has a geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, product
from typing import Any, TypeVar

from trimtab.behaviors.behavior import Behavior, Splits
from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import Coherence, coherence_for
from trimtab.evaluation.judges import Judge, judge_for
from trimtab.evaluation.readout import ReadoutTokens, readout_tokens
from trimtab.evaluation.summary import mean
from trimtab.mechanism.circuits.teacher_forced import (
    RESPONSES,
    TokenRuns,
    scored_prompts,
    token_runs,
)
from trimtab.models import generation
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.results import Progress
from trimtab.steering.vector import VectorSteering

T = TypeVar("T")


@dataclass(eq=False)
class Case:
    """A vector to explain.

    Attributes:
        lm: the unsteered model.
        behavior: what the vector is for.
        vector: at the strength that is explained.
        signs: directions read: 1 toward, -1 away.
        max_prompts: at most so many a direction.
        max_new_tokens: length of responses and answers.
        seed: of the split and of everything random.
    """

    lm: LanguageModel
    behavior: Behavior
    vector: VectorSteering
    signs: tuple[int, ...] = (1, -1)
    max_prompts: int | None = None
    max_new_tokens: int = 24
    seed: int = 0
    # The unsteered answers: length and prompt to answer, all in tokens.
    _known: dict[tuple[int, ...], list[int]] = field(default_factory=dict, repr=False)

    def under(self, vector: VectorSteering, **limits: Any) -> Case:
        """Return the case of another vector or strength (or limits), with all that is prepared."""
        other = copy(self)
        vars(other).update(limits, vector=vector)
        return other

    @cached_property
    def splits(self) -> Splits:
        """The behavior's splits."""
        return self.behavior.split(self.seed)

    @cached_property
    def judge(self) -> Judge:
        """What scores answers."""
        return judge_for(self.behavior)

    @cached_property
    def coherence(self) -> Coherence:
        """What scores their soundness."""
        return coherence_for(self.behavior)

    @cached_property
    def readout(self) -> ReadoutTokens:
        """The two sets of first tokens between which the gap is."""
        return readout_tokens(self.lm, self.behavior)

    def part(self, name: str | None) -> Behavior:
        """Return a split by its name, or for None the whole behavior."""
        return self.behavior if name is None else self.splits.named(name)

    def prompts(self, part: Behavior, sign: int) -> list[Prompt]:
        """Return the prompts whose answers a steering of this sign is to change."""
        return scored_prompts(part, sign)[: self.max_prompts]

    def runs(self, part: Behavior) -> dict[str, TokenRuns]:
        """Return the sets that the vector is read on, by direction and by whose response it is.

        Steering toward runs at |m| on prompts that do not show the behavior, steering away at -|m|
        on prompts that do: "toward/steered", "toward/base", "away/steered", "away/base". A set that
        the steering does not change at all is left out; if that is every one, it is refused.
        """
        found: dict[str, TokenRuns] = {}
        refusal: TrimtabError | None = None
        for sign, responses in product(self.signs, RESPONSES):
            name = f"{'toward' if sign > 0 else 'away'}/{responses}"
            at, prompts = self.vector.at(sign * abs(self.vector.strength)), self.prompts(part, sign)
            length = self.max_new_tokens
            try:
                found[name] = token_runs(
                    self.lm, at, prompts, responses, length, name, self.unsteered
                )
            except TrimtabError as error:
                refusal = error
        if not found and refusal is not None:
            raise refusal
        return found

    def unsteered(self, encoded: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        """Return the unsteered greedy answers in tokens; each is written once."""
        keys = [(max_new_tokens, *item.ids) for item in encoded]
        new = {k: item for k, item in zip(keys, encoded, strict=True) if k not in self._known}
        for item in new.values():
            self.lm.check_length(len(item.ids) + max_new_tokens)
        if new:
            found = generation.answer_ids(self.lm, list(new.values()), max_new_tokens)
            self._known.update(zip(new, found, strict=True))
        return [self._known[key] for key in keys]

    def judged(
        self, prompts: Sequence[Prompt], answers: Sequence[str], sign: int
    ) -> tuple[list[float], float]:
        """Return how far each answer is on the wanted side, and the answers' mean coherence."""
        verdicts = self.judge(prompts, answers)
        return [verdict.share(sign) for verdict in verdicts], mean(self.coherence(answers))

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the unsteered greedy answers as text."""
        encoded = [self.lm.encode(prompt) for prompt in prompts]
        stops = generation.end_ids(self.lm)
        return [
            generation.decode(self.lm.tokenizer, ids, stops)
            for ids in self.unsteered(encoded, self.max_new_tokens)
        ]


def check_adds(vector: VectorSteering) -> None:
    """Refuse a steering that adds no fixed push to the stream."""
    if vector.operation != "add" or vector.strength == 0:
        raise TrimtabError(
            asked=f"what {vector.label} does in the network",
            found=f"operation {vector.operation} at strength {vector.strength:g}, which adds no "
            "fixed push",
            advice="give a vector that adds, at the strength it is used at (trimtab tune)",
        )


def counting(progress: Progress | None, total: int) -> Callable[[T], T]:
    """Return a function that takes a step's result, counts the step and returns the result."""
    steps = count(1)

    def done(result: T) -> T:
        if progress is not None:
            progress(next(steps), total)
        return result

    return done
