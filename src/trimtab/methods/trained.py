"""What the trained vectors share: where one is trained, what it starts from, how it is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.methods.contrast import Contrast, read_contrast
from trimtab.methods.registry import Found, Task
from trimtab.methods.training import Rows, Trainer
from trimtab.methods.wanted import SOURCES, own_answers
from trimtab.models.gradients import frozen

SIDES = {"toward": (1,), "away": (-1,), "both": (1, -1)}
INITS = ("mean_difference", "random")


@dataclass(frozen=True)
class Recipe:
    """The options that every trained vector has; their meaning is on the methods' pages.

    Raises:
        TrimtabError: an option that cannot be used.
    """

    layer: int | None
    side: str
    steps: int
    batch_size: int
    learning_rate: float
    strengths: tuple[float, float]
    max_completion_tokens: int
    keep: float
    init: str
    init_strength: float
    wanted: str

    def __post_init__(self) -> None:
        """Check everything before any answer is generated."""
        choice("side", self.side, tuple(SIDES))
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


def train_vector(
    task: Task, recipe: Recipe, rows: Callable[[int], tuple[Rows, dict[str, int]]]
) -> Found:
    """Train one vector at one layer and report it.

    Args:
        task: what to find it from.
        recipe: the options.
        rows: sign -> its training rows, without the kept ones, and where the answers came from.

    Raises:
        TrimtabError: no layer to train at, sides that cannot be told apart where the start is read,
            or a loss that is not finite.
    """
    at = _layer(task, recipe.layer)
    contrast = read_contrast(task, [at])
    generator = torch.Generator().manual_seed(task.seed)
    first = _start(task, recipe, contrast, at, generator)
    sides: list[Rows] = []
    sources: dict[str, Any] = {}
    for sign in SIDES[recipe.side]:
        side, sources["toward" if sign > 0 else "away"] = rows(sign)
        if recipe.keep > 0:
            shown = task.behavior.toward if sign > 0 else task.behavior.away
            kept = own_answers(task, shown, recipe.max_completion_tokens).encoded
            side = replace(side, kept=kept)
        sides.append(side)
    # v = w * scale, so that |w| is the strength m
    trainer = Trainer(task, at, task.norms.scales[at], sides, recipe.keep)
    with frozen(task.lm.model):
        before = trainer.loss(torch.zeros_like(first))
        w = trainer.train(
            first,
            recipe.steps,
            recipe.batch_size,
            recipe.learning_rate,
            recipe.strengths,
            generator,
        )
        after = trainer.loss(w)
    m, (low, high) = float(w.norm()), recipe.strengths
    used = 1.0 if low <= 1 <= high else (low + high) / 2
    found = contrast.found({at: w.double().cpu()})
    return Found(
        vectors=found.vectors,
        read_at=f"trained; start {recipe.init} at {found.read_at}",
        class_gaps=found.class_gaps,
        spreads=found.spreads,
        strength=(-m if recipe.side == "away" else m) * used,
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
