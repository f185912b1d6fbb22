"""A vector trained so that the wanted answers become likely, with the model frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.chat import Encoded
from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.find.contrast import read_contrast
from trimtab.find.registry import Found, Task, register
from trimtab.find.training import Rows, Trainer, frozen
from trimtab.find.wanted import SOURCES, Judge, own_answers, wanted_answers

SIDES = {"toward": (1,), "away": (-1,), "both": (1, -1)}
INITS = ("mean_difference", "random")


@register("next_token", read_at="last", added_at="all")
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
    """Train one vector v at one layer: minimise -log p(y | x, h + a v) over wanted answers y.

    The factor a is drawn anew for each row, so that a window of strengths works rather than one.
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
            already show the behaviour; 0 turns it off.
        init: `mean_difference` or `random`, the direction it starts from.
        init_strength: the strength m it starts at.
        completions: wanted answers as `{"prompt", "completion"}` dicts or Examples.
        wanted: where answers come from that are not given, see `wanted.wanted_answers`.
        judge: `(prompts, answers) -> verdicts`; own answers it does not call wanted are left out.

    Raises:
        TrimtabError: no wanted answers, an unusable option, or a loss that is not finite.
    """
    at = _layer(task, layer)
    _check(side, steps, batch_size, learning_rate, strengths, max_completion_tokens, keep)
    choice("init", init, INITS)
    choice("source of wanted answers", wanted, SOURCES)
    contrast = read_contrast(task, [at])
    generator = torch.Generator().manual_seed(task.seed)
    scale = task.norms.scales[at]  # v = w * scale, so that |w| is the strength m
    start = contrast.difference(at).float()
    if init == "random":
        start = torch.randn(task.lm.d_model, generator=generator)
    elif not contrast.telling:
        raise TrimtabError(
            f"a start from the mean difference at layer {at}",
            f"sides that cannot be told apart there (read at {contrast.read_at})",
            "use init='random', a deeper layer, or another position",
        )
    first = (start / start.norm() * init_strength).to(task.lm.device)
    sides: list[Rows] = []
    sources: dict[str, Any] = {}
    for sign in SIDES[side]:
        target = wanted_answers(
            task,
            sign,
            tokens=max_completion_tokens,
            completions=completions,
            source=wanted,
            judge=judge,
        )
        sources["toward" if sign > 0 else "away"] = dict(target.sources)
        kept: tuple[Encoded, ...] = ()
        if keep > 0:
            shown = task.behavior.toward if sign > 0 else task.behavior.away
            kept = own_answers(task, shown, max_completion_tokens).encoded
        sides.append(Rows(sign, target.encoded, kept))
    trainer = Trainer(task, at, scale, sides, keep)
    with frozen(task.lm.model):
        before = trainer.loss(torch.zeros_like(first))
        w = trainer.train(first, steps, batch_size, learning_rate, strengths, generator)
        after = trainer.loss(w)
    m = float(w.norm())
    found = contrast.found({at: w.double().cpu()})
    return Found(
        vectors=found.vectors,
        read_at=f"trained; start {init} at {found.read_at}",
        class_gaps=found.class_gaps,
        spreads=found.spreads,
        strength=-m if side == "away" else m,
        details={
            "layer": at,
            "wanted": sources,
            "window": [m * strengths[0], m * strengths[1]],
            "loss_unsteered": before,
            "loss_trained": after,
        },
    )


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


def _check(
    side: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    strengths: Sequence[float],
    tokens: int,
    keep: float,
) -> None:
    choice("side", side, tuple(SIDES))
    problem = ""
    if min(steps, batch_size, tokens) < 1:
        problem = f"steps={steps}, batch_size={batch_size}, max_completion_tokens={tokens}"
    elif not (math.isfinite(learning_rate) and learning_rate > 0):
        problem = f"learning_rate={learning_rate}"
    elif not (math.isfinite(keep) and keep >= 0):
        problem = f"keep={keep}"
    elif len(strengths) != 2 or not 0 < strengths[0] <= strengths[1] < math.inf:
        problem = f"strengths={tuple(strengths)}"
    if problem:
        raise TrimtabError(
            "a trained vector",
            problem,
            "use counts from 1, positive rates, keep from 0, and strengths=(low, high) above 0",
        )
