"""What every conversion starts from and gives back.

It starts from a behavior that is split once: fitted on train prompts, chosen on validation prompts,
reported on test prompts. It gives back the new lever, its residual and what it recovers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator, Unsteered
from trimtab.levers.conversions.recovered import Recovered, recovered
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.prompts.soft.soft import Soft
from trimtab.results.tables import Printable, Table, number, to_plain
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.together import Together
from trimtab.steering.vector import Switch, VectorSteering
from trimtab.steering.weights import WeightSteering, Writer, writer_of

_LEVERS = (VectorSteering, PromptSteering, WeightSteering, Together)


class Levered(Printable):
    """Mixin for frozen dataclasses that hold a lever beside its figures."""

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values, levers by their label; tensors have their own files."""
        assert dataclasses.is_dataclass(self)
        found: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _LEVERS):
                value = value.label
            elif isinstance(value, Soft):
                value = {"loss": value.loss, "start_loss": value.start_loss, "steps": value.steps}
            elif isinstance(value, tuple) and any(isinstance(item, _LEVERS) for item in value):
                value = [item.label for item in value]
            found[field.name] = to_plain(value)
        return found


class Conversion(Levered, ABC):
    """Mixin for a converted lever: `lever`, mostly `recovered`, and what was lost, said first.

    `lost` says what the residual is a share of.
    """

    lost: ClassVar[str]
    lever: Any

    @property
    @abstractmethod
    def residual(self) -> float | None:
        """What the new lever lacks, 0 for nothing; None where it was not measured."""

    @abstractmethod
    def figures(self) -> Table:
        """Return the figures of this kind of conversion."""

    def table(self) -> Table:
        """Return the figures under a title that says what is lost, the recovery underneath."""
        figures, found = self.figures(), self.measured
        title = f"{figures.title}: residual {number(self.residual, 3)} ({self.lost})"
        notes = figures.notes
        if found is not None:
            title += f"; recovered: {found.told}"
            notes += found.table().notes
        return dataclasses.replace(figures, title=title, notes=notes)

    @property
    def measured(self) -> Recovered | None:
        """What of the converted lever's effect the new one has on test prompts."""
        return getattr(self, "recovered", None)

    def to_dict(self) -> dict[str, object]:
        return {"residual": to_plain(self.residual), **super().to_dict()}


class Setting:
    """A behavior split once, for one or several conversions.

    Args:
        lm: the unsteered model.
        behavior: split here.
        sign: side of the scored prompts, as in `Evaluator`: +1 toward, -1 away.
        train_requests: most train prompts of each side; None for the conversion's own number.
        max_prompts: most prompts of each side of the other splits.
        max_new_tokens: length of answers.
        seed: of the split, of nulls and intervals, and of everything else that is random.
        known: unsteered answers of that length to share.
    """

    def __init__(
        self,
        lm: LanguageModel,
        behavior: Behavior,
        *,
        sign: int = 1,
        train_requests: int | None = None,
        max_prompts: int | None = 32,
        max_new_tokens: int = 40,
        seed: int = 0,
        known: Unsteered | None = None,
    ) -> None:
        self.lm, self.sign, self.seed = lm, sign, seed
        self.train_requests, self.max_prompts = train_requests, max_prompts
        self.splits = behavior.split(seed)
        self.known = known or Unsteered(lm, max_new_tokens)

    def train(self, usual: int) -> Evaluator:
        """Return the evaluator of train prompts, at most `usual` of each side unless told otherwise."""
        return self._evaluator(self.splits.train, self.train_requests or usual)

    @cached_property
    def validation(self) -> Evaluator:
        """The evaluator of validation prompts."""
        return self._evaluator(self.splits.validation, self.max_prompts)

    @cached_property
    def test(self) -> Evaluator:
        """The evaluator of test prompts, on which nothing is chosen."""
        return self._evaluator(self.splits.test, self.max_prompts)

    def _evaluator(self, part: Behavior, most: int | None) -> Evaluator:
        tokens = self.known.max_new_tokens
        return Evaluator(
            self.lm, part, max_new_tokens=tokens, max_prompts=most, unsteered=self.known
        )

    def prompts(self, part: Evaluator) -> list[Prompt]:
        """Return the prompts of a split whose answers are scored."""
        return part.prompts(part.scored(self.sign))

    def answered(self, part: Evaluator) -> list[Encoded]:
        """Return the prompts of all sides of a split with their unsteered answers."""
        sides = ["toward", "away", *(["requests"] if part.behavior.requests else [])]
        return [
            self.lm.encode(prompt, completion=answer)
            for side in sides
            for prompt, answer in zip(part.prompts(side), part.unsteered(side), strict=True)
        ]

    def null(self, vector: VectorSteering) -> VectorSteering:
        """Return a random direction as long as the vector."""
        return random_null(vector, null_seeds(self.seed, 1)[0])

    def recovered(self, before: Switch, after: Switch, null: Switch | None = None) -> Recovered:
        """Measure a lever and what it became on test prompts, beside a null."""
        return recovered(
            self.lm, self.test, before, after, sign=self.sign, null=null, seed=self.seed
        )


def together(vectors: Sequence[VectorSteering], name: str) -> VectorSteering | Together:
    """Return one vector as it is, several as one lever."""
    return vectors[0] if len(vectors) == 1 else Together(tuple(vectors), name)


@torch.no_grad()
def read_writers(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    writers: Iterable[Writer],
    read: Callable[[Writer, Tensor, Tensor], None],
) -> None:
    """Call `read` with each writer, its inputs `[batch, seq, width]` and a mask without the padding."""
    inside = torch.empty(0)

    def seen(writer: Writer, x: Tensor) -> None:
        read(writer, x, inside.to(x.device))

    with Hooks() as hooks:
        for writer in writers:
            hooks.before(writer_of(lm, writer), partial(seen, writer))
        for batch in lm.batches(encoded):
            inside = batch.attention_mask.bool()
            lm.forward(batch, logits_to_keep=1)


def refuse_post_norm(lm: LanguageModel, asked: str, advice: str) -> None:
    """Refuse a model in which what a writer adds is not what the stream gets."""
    if lm.sites.post_norm:
        found = (
            f"{type(lm.model).__name__} puts a norm between the output projection and the stream"
        )
        raise TrimtabError(asked, found, advice)


def explained(values: Tensor, v: Tensor) -> float:
    """Return the uncentered share of the squares of `[n, d_model]` values that a constant explains."""
    return float(1 - (values - v).square().sum() / values.square().sum().clamp(min=1e-12))
