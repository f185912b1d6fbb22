"""A vector trained to prefer wanted answers to the model's own, with the model frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import TrimtabError
from trimtab.methods.recipe import Recipe, with_options
from trimtab.methods.registry import Found, Task, register
from trimtab.methods.trained import train_vector
from trimtab.methods.training import Rows, log_likelihoods
from trimtab.methods.wanted import Answered, own_answers
from trimtab.models.chat import Encoded


@dataclass(frozen=True, eq=False)
class Preference:
    """The one-directional RePS objective: mean of -log sigmoid(Delta) over pairs of answers.

    Delta = (beta / |y_w|) log p(y_w) - (1 / |y_l|) log p(y_l).

    Attributes:
        betas: beta of each pair, `[pairs]`.
    """

    betas: Tensor

    def __call__(self, log_p: Tensor, tokens: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return the mean loss per pair; `log_p` and `tokens` are `[2 chosen]`, wanted first."""
        n = len(chosen)
        mean = log_p / tokens
        delta = self.betas[list(chosen)].to(log_p.device) * mean[:n] - mean[n:]
        return -logsigmoid(delta).mean()


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(Recipe):
    """How a vector is trained by preference; `batch_size` counts pairs.

    Attributes:
        phi: how much a wanted answer that the model finds unlikely weighs more.
    """

    phi: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.phi) and self.phi >= 0):
            raise TrimtabError(
                "a vector trained by preference", f"phi={self.phi}", "use phi from 0"
            )


@register("preference", aliases=("reps",), added_at="all")
@with_options(PreferenceRecipe)
def preference(task: Task, recipe: PreferenceRecipe) -> Found:
    """Train one vector v at one layer: minimize -log sigmoid(Delta) over pairs of answers.

    Delta = (beta / |y_w|) log p(y_w | x, h + a v) - (1 / |y_l|) log p(y_l | x, h + a v), with y_w a
    wanted answer and y_l the model's own unsteered answer to the same request, and
    beta = max(phi (log p(y_l | x) - log p(y_w | x)), 1) from the unsteered model. The factor a is
    drawn again for each pair. The found strength is that of `next_token`.

    Source: the preference objective of Cheng et al., 2026 (arXiv 2604.08524), which is one direction
    of RePS (Wu et al., 2025, arXiv 2505.20809); with next_token's keep term.

    Args:
        task: what to find it from.
        recipe: its fields are the options.

    Raises:
        TrimtabError: no wanted answers, none that differ from the model's own, an unusable option,
            or a loss that is not finite.
    """

    def rows(sign: int, target: Answered) -> Rows:
        chosen, own = _pairs(task, target, recipe.max_completion_tokens)
        # With what training adds its vector to: the unsteered model.
        gap = log_likelihoods(task.lm, own) - log_likelihoods(task.lm, chosen)
        return Rows(sign, chosen, (), Preference((recipe.phi * gap).clamp(min=1.0)), own)

    return train_vector(task, recipe, rows)


def _pairs(
    task: Task, target: Answered, tokens: int
) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """Return the wanted answers and the model's own ones to the same requests, where they differ."""
    own = own_answers(task, target.examples, tokens)
    known = {example.key: item for example, item in zip(own.examples, own.encoded, strict=True)}
    pairs = [
        (item, known[example.key])
        for item, example in zip(target.encoded, target.examples, strict=True)
        if example.key in known and known[example.key].ids != item.ids
    ]
    if not pairs:
        raise TrimtabError(
            f"a preference among answers to {len(target.encoded)} requests of "
            f"{task.behavior.name!r}",
            "wanted answers that are the model's own already, or no answers of its own",
            "give requests that the model does not answer as wanted, or use next_token",
        )
    wanted, unwanted = zip(*pairs, strict=True)
    return wanted, unwanted
