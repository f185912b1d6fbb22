"""A vector trained so that the wanted answers become likely, with the model frozen."""

from __future__ import annotations

from trimtab.methods.recipe import Recipe, with_options
from trimtab.methods.registry import Found, Task, register
from trimtab.methods.trained import train_vector
from trimtab.methods.training import Rows


@register("next_token", added_at="all")
@with_options(Recipe)
def next_token(task: Task, recipe: Recipe) -> Found:
    """Train one vector v at one layer: minimize -log p(y | x, h + a v) over wanted answers y.

    The factor a is drawn again for each row, so that a window of strengths works rather than one.
    The found strength is |v| in units of mu_l / sqrt(d_model), the m of every other method;
    negative for direction `away`, whose vector still points toward.

    Source: the next-token objective of Cheng et al., 2026 (arXiv 2604.08524), with a keep term.

    Args:
        task: what to find it from.
        recipe: its fields are the options.

    Raises:
        TrimtabError: no wanted answers, an unusable option, or a loss that is not finite.
    """
    return train_vector(task, recipe, lambda sign, target: Rows(sign, target.encoded, ()))
