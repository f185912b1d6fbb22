"""A vector trained so that the wanted answers become likely, with the model frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.methods.registry import Found, Task, register
from trimtab.methods.trained import Recipe, train_vector
from trimtab.methods.training import Rows
from trimtab.methods.wanted import Judge, wanted_answers


@register("next_token", added_at="all")
def next_token(
    task: Task,
    *,
    layer: int | None = None,
    side: str = "toward",
    steps: int = 120,
    batch_size: int = 16,
    learning_rate: float = 0.06,
    strengths: tuple[float, float] = (0.75, 1.5),
    max_completion_tokens: int = 32,
    keep: float = 0.1,
    init: str = "mean_difference",
    init_strength: float = 1.0,
    completions: Sequence[Any] | None = None,
    wanted: str = "auto",
    judge: Judge | None = None,
) -> Found:
    """Train one vector v at one layer: minimize -log p(y | x, h + a v) over wanted answers y.

    The factor a is drawn again for each row, so that a window of strengths works rather than one.
    The found strength is |v| in units of mu_l / sqrt(d_model), the m of every other method;
    negative for side `away`, whose vector still points toward.

    Source: the next-token objective of Cheng et al., 2026 (arXiv 2604.08524), with a keep term.

    Args:
        task: what to find it from.
        layer: the layer it is added at; the one at 25 % of the depth when absent.
        side: `toward`, `away`, or `both`: one vector for +a v and -a v.
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
        TrimtabError: no wanted answers, an unusable option, or a loss that is not finite.
    """
    recipe = Recipe(
        layer, side, steps, batch_size, learning_rate, strengths, max_completion_tokens, keep, init,
        init_strength, wanted,
    )  # fmt: skip

    def rows(sign: int) -> tuple[Rows, dict[str, int]]:
        target = wanted_answers(
            task,
            sign,
            tokens=max_completion_tokens,
            completions=completions,
            source=wanted,
            judge=judge,
        )
        return Rows(sign, target.encoded, ()), dict(target.sources)

    return train_vector(task, recipe, rows)
