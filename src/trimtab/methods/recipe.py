"""The options that every trained vector has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

from trimtab.arguments import Direction, signs_of
from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.methods.registry import Found, Task
from trimtab.methods.wanted import SOURCES, Judge

INITS = ("mean_difference", "random")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a vector is trained.

    Attributes:
        layer: the layer it is added at; the one at 25 % of the depth when absent.
        direction: `toward`, `away`, or `both`: one vector for +a v and -a v.
        steps: of Adam, with linear decay to 0.
        batch_size: wanted answers per step; half as many kept ones are added to them.
        learning_rate: per coordinate, in units of mu_l / sqrt(d_model).
        strengths: the range of a, uniform.
        max_completion_tokens: only the first tokens of an answer count.
        keep: weight of KL(unsteered || steered) along the model's own answers to prompts that
            already show the behavior; 0 turns it off.
        init: `mean_difference` or `random`, the direction it starts from.
        init_strength: the strength m it starts at.
        completions: wanted answers as `{"prompt", "completion"}` dicts or Examples.
        wanted: where answers come from that are not given, see `wanted.wanted_answers`.
        judge: `(prompts, answers) -> verdicts`; own answers it does not call wanted are left out.

    Raises:
        TrimtabError: an option that cannot be used, before any answer is generated.
    """

    layer: int | None = None
    direction: Direction = "toward"
    steps: int = 120
    batch_size: int = 16
    learning_rate: float = 0.06
    strengths: tuple[float, float] = (0.75, 1.5)
    max_completion_tokens: int = 32
    keep: float = 0.1
    init: str = "mean_difference"
    init_strength: float = 1.0
    completions: Sequence[Any] | None = None
    wanted: str = "auto"
    judge: Judge | None = None

    def __post_init__(self) -> None:
        signs_of(self.direction)
        low_high = self.strengths
        problem = ""
        if min(self.steps, self.batch_size, self.max_completion_tokens) < 1:
            problem = (
                f"steps={self.steps}, batch_size={self.batch_size}, "
                f"max_completion_tokens={self.max_completion_tokens}"
            )
        elif not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            problem = f"learning_rate={self.learning_rate}"
        elif not (math.isfinite(self.keep) and self.keep >= 0):
            problem = f"keep={self.keep}"
        elif len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
            problem = f"strengths={tuple(low_high)}"
        if problem:
            raise TrimtabError(
                "a trained vector",
                problem,
                "use counts from 1, positive rates, keep from 0, and strengths=(low, high) above 0",
            )
        choice("init", self.init, INITS)
        choice("source of wanted answers", self.wanted, SOURCES)


R = TypeVar("R", bound=Recipe)


def with_options(recipe: type[R]) -> Callable[[Callable[[Task, R], Found]], Callable[..., Found]]:
    """Give a method the fields of a recipe as keyword options of its own."""

    def decorate(method: Callable[[Task, R], Found]) -> Callable[..., Found]:
        @wraps(method)
        def found(task: Task, **options: Any) -> Found:
            return method(task, recipe(**options))

        task = Parameter("task", Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [task, *signature(recipe).parameters.values()]
        found.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        return found

    return decorate
