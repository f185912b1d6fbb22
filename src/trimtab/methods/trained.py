"""What the trained vectors share: where one is trained, what it starts from, how it is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.arguments import signs_of
from trimtab.errors import TrimtabError
from trimtab.methods.contrast import Contrast, read_contrast
from trimtab.methods.recipe import Recipe
from trimtab.methods.registry import Found, Task
from trimtab.methods.training import Rows, Trainer
from trimtab.methods.wanted import Answered, own_answers, wanted_answers
from trimtab.models.gradients import frozen


def train_vector(task: Task, recipe: Recipe, rows: Callable[[int, Answered], Rows]) -> Found:
    """Train one vector at one layer and report it.

    `rows` gives the training rows of a sign and its wanted answers, without the kept ones.

    Raises:
        TrimtabError: no layer to train at, sides that cannot be told apart where the start is read,
            no wanted answers, or a loss that is not finite.
    """
    at = _layer(task, recipe.layer)
    contrast = read_contrast(task, [at])
    generator = torch.Generator().manual_seed(task.seed)
    first = _start(task, recipe, contrast, at, generator)
    sides: list[Rows] = []
    sources: dict[str, Any] = {}
    for sign in signs_of(recipe.direction):
        length = recipe.max_completion_tokens
        target = wanted_answers(task, sign, length, recipe.completions, recipe.wanted, recipe.judge)
        side = rows(sign, target)
        left_out = {"without a pair": len(target.encoded) - len(side.wanted)}
        counts = {**target.sources, **left_out}
        sources["toward" if sign > 0 else "away"] = {name: n for name, n in counts.items() if n}
        if recipe.keep > 0:
            shown = task.behavior.toward if sign > 0 else task.behavior.away
            side = replace(side, kept=own_answers(task, shown, length).encoded)
        sides.append(side)
    # v = w * scale, so that |w| is the strength m
    trainer = Trainer(task, at, task.norms.scales[at], sides, recipe.keep)
    with frozen(task.lm.model):
        before = trainer.loss(torch.zeros_like(first))
        w = trainer.train(first, recipe, generator)
        after = trainer.loss(w)
    m, (low, high) = float(w.norm()), recipe.strengths
    used = 1.0 if low <= 1 <= high else (low + high) / 2
    found = contrast.found({at: w.double().cpu()})
    return replace(
        found,
        read_at=f"trained; start {recipe.init} at {found.read_at}",
        strength=(-m if recipe.direction == "away" else m) * used,
        details={
            "layer": at,
            "wanted": sources,
            "window": [m * low, m * high],
            "loss_unsteered": before,
            "loss_trained": after,
        },
    )


def _start(
    task: Task, recipe: Recipe, contrast: Contrast, layer: int, generator: torch.Generator
) -> Tensor:
    """Return the w that training starts from, `[d_model]` of length `init_strength`."""
    start = contrast.difference(layer).float()
    if recipe.init == "random":
        start = torch.randn(task.lm.d_model, generator=generator)
    elif not contrast.telling:
        raise TrimtabError(
            f"a start from the mean difference at layer {layer}",
            f"sides that cannot be told apart there (read at {contrast.read_at})",
            "use init='random', a deeper layer, or another position",
        )
    return (start / start.norm() * recipe.init_strength).to(task.lm.device)


def _layer(task: Task, layer: int | None) -> int:
    """Return the layer that is trained: the option, the one active layer, or 25 % of the depth."""
    active = task.active or ()
    if len(active) > 1 or (layer is not None and active and active != (layer,)):
        raise TrimtabError(
            f"a trained vector for the layers {list(active)}" + (f", layer={layer}" * bool(layer)),
            "a method that trains one vector at one layer",
            "name one layer, by layers= or layer=",
        )
    if layer is None:
        layer = active[0] if active else max(0, math.ceil(task.lm.n_layers / 4) - 1)
        return 0 if task.site == "embed" else layer
    if isinstance(layer, bool) or layer not in task.layers:
        raise TrimtabError(
            f"a vector trained at layer {layer!r}",
            f"a model with {task.site} at the layers {task.layers[0]} to {task.layers[-1]}",
            "name one of these",
        )
    return layer
