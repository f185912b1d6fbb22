"""A vector trained to prefer wanted answers to the model's own, with the model frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import TrimtabError
from trimtab.methods.registry import Found, Task, register
from trimtab.methods.trained import Recipe, train_vector
from trimtab.methods.training import Rows, log_likelihoods
from trimtab.methods.wanted import Answered, Judge, own_answers, wanted_answers
from trimtab.models.chat import Encoded


@dataclass(frozen=True, eq=False)
class Preference:
    """The one-directional RePS objective: mean of -log sigmoid(Delta) over pairs of answers.

    Delta = (beta / |y_w|) log p(y_w) - (1 / |y_l|) log p(y_l).

    Attributes:
        betas: beta of each pair, `[pairs]`.
    """

    betas: Tensor
    compares = True

    def __call__(self, log_p: Tensor, tokens: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return the mean loss per pair; `log_p` and `tokens` are `[2 chosen]`, wanted first."""
        n = len(chosen)
        mean = log_p / tokens
        delta = self.betas[list(chosen)].to(log_p.device) * mean[:n] - mean[n:]
        return -logsigmoid(delta).mean()


@register("preference", aliases=("reps",), added_at="all")
def preference(
    task: Task,
    *,
    layer: int | None = None,
    side: str = "toward",
    steps: int = 120,
    batch_size: int = 16,
    learning_rate: float = 0.06,
    strengths: tuple[float, float] = (0.75, 1.5),
    max_completion_tokens: int = 32,
    phi: float = 1.0,
    keep: float = 0.1,
    init: str = "mean_difference",
    init_strength: float = 1.0,
    completions: Sequence[Any] | None = None,
    wanted: str = "auto",
    judge: Judge | None = None,
) -> Found:
    """Train one vector v at one layer: minimize -log sigmoid(Delta) over pairs of answers.

    Delta = (beta / |y_w|) log p(y_w | x, h + a v) - (1 / |y_l|) log p(y_l | x, h + a v), with y_w a
    wanted answer and y_l the model's own unsteered answer to the same request, and
    beta = max(phi (log p(y_l | x) - log p(y_w | x)), 1) from the unsteered model. The factor a is
    drawn again for each pair. The found strength is that of `next_token`.

    Source: the preference objective of Cheng et al., 2026 (arXiv 2604.08524), which is one direction
    of RePS (Wu et al., 2025, arXiv 2505.20809); with next_token's keep term.

    Args:
        task: what to find it from.
        layer: the layer it is added at; the one at 25 % of the depth when absent.
        side: `toward`, `away`, or `both`: one vector for +a v and -a v.
        steps: of Adam, with linear decay to 0.
        batch_size: pairs per step; half as many kept answers are added to them.
        learning_rate: per coordinate, in units of mu_l / sqrt(d_model).
        strengths: the range of a, uniform.
        max_completion_tokens: only the first tokens of an answer count.
        phi: how much a wanted answer that the model finds unlikely weighs more.
        keep: weight of KL(unsteered || steered) along the model's own answers to prompts that
            already show the behavior; 0 turns it off.
        init: `mean_difference` or `random`, the direction it starts from.
        init_strength: the strength m it starts at.
        completions: wanted answers as `{"prompt", "completion"}` dicts or Examples.
        wanted: where answers come from that are not given, see `wanted.wanted_answers`.
        judge: `(prompts, answers) -> verdicts`; own answers it does not call wanted are left out.

    Raises:
        TrimtabError: no wanted answers, none that differ from the model's own, an unusable option,
            or a loss that is not finite.
    """
    recipe = Recipe(
        layer, side, steps, batch_size, learning_rate, strengths, max_completion_tokens, keep, init,
        init_strength, wanted,
    )  # fmt: skip
    if not (math.isfinite(phi) and phi >= 0):
        raise TrimtabError("a vector trained by preference", f"phi={phi}", "use phi from 0")

    def rows(sign: int) -> tuple[Rows, dict[str, int]]:
        target = wanted_answers(
            task,
            sign,
            tokens=max_completion_tokens,
            completions=completions,
            source=wanted,
            judge=judge,
        )
        chosen, own = _pairs(task, target, max_completion_tokens)
        # With what training adds its vector to: the unsteered model.
        gap = log_likelihoods(task.lm, own) - log_likelihoods(task.lm, chosen)
        objective = Preference((phi * gap).clamp(min=1.0))
        same = len(target.encoded) - len(chosen)
        counts = {**target.sources, **({"without a pair": same} if same else {})}
        return Rows(sign, chosen, (), objective, own), counts

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
