"""The arms of one restart: the pipeline's stages, and what they are measured against.

The pipeline is a soft prefix, its projection to allowed tokens and their repair by HotFlip; the
baselines run beside it with at least its tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trimtab.prompts.discrete.descent import Descent
from trimtab.prompts.discrete.gcg import gcg
from trimtab.prompts.discrete.hotflip import hotflip
from trimtab.prompts.pipeline.attempt import Attempt, Cost, costing
from trimtab.prompts.pipeline.task import SearchTask
from trimtab.prompts.projections.project import project
from trimtab.prompts.soft.soft import Soft, train_soft

ROUNDS = 50  # descents of one restart at most, whatever the budget
RATE_STEPS = 4


def soft_stage(task: SearchTask, restart: int) -> tuple[Attempt, Soft]:
    """Train the soft prefix of one restart."""
    settings = task.settings
    alternate = "reference" if restart % 2 else "random_tokens"
    with costing(task.lm) as cost:
        soft = train_soft(
            task.lm,
            task.rows,
            task.k,
            init=alternate if settings.init == "alternate" else settings.init,
            reference=task.reference,
            steps=settings.soft_steps,
            learning_rate=settings.soft_rate,
            generator=task.generator("soft", restart),
            allowed=task.bound.allowed,
        )
    attempt = Attempt(
        arm="soft",
        restart=restart,
        ids=(),
        text="",
        train=soft.loss,
        violated_start={},
        legal=True,
        validation=task.loss(task.validation, soft),
    )
    details = {"start": soft.init, "start_loss": soft.start_loss, "steps": soft.steps}
    return paid(attempt, cost, details=details), soft


def projection_stage(task: SearchTask, restart: int, soft: Soft, arm: str) -> Attempt:
    """Project a soft prefix to allowed tokens, by the search's method or by nearest neighbors."""
    nearest = arm == "nearest"
    method = "nearest" if nearest else task.settings.projection
    options = {} if nearest else dict(task.settings.projection_options)
    with costing(task.lm) as cost:
        found = project(
            task.lm,
            task.rows,
            soft,
            method,
            generator=task.generator(arm, restart),
            allowed=task.bound.allowed,
            legal=task.bound.legal,
            **options,
        )
    attempt = task.attempt(arm, restart, found.ids, found.loss)
    return paid(attempt, cost, details={"method": method})


def descent_stage(
    task: SearchTask,
    arm: str,
    restart: int,
    start: Sequence[int],
    steps: int,
    tag: str = "",
    descend: Callable[..., Descent] = hotflip,
    **options: int,
) -> Attempt:
    """Descend from a start; one that violates constraints is repaired first, and reported."""
    kernel = task.kernel()
    with costing(task.lm) as cost:
        found = descend(
            kernel,
            task.bound,
            start,
            steps=steps,
            generator=task.generator(arm + tag, restart),
            journal=task.journal,
            run=f"{arm}{tag} {restart}",
            **{"top_k": task.settings.top_k, **options},
        )
    names = ("stopped", "repair_steps", "flips", "swaps", "scored")
    details = {name: getattr(found, name) for name in names} | {"from": found.curve[0]}
    attempt = task.attempt(arm, restart, found.ids, found.loss)
    attempt = replace(attempt, violated_start=dict(found.violated_start))
    # A draft is another model, which the count on this one does not see.
    drafted = Cost(kernel.counts.draft_calls, kernel.counts.draft_tokens)
    return paid(attempt, cost, drafted, details=details)


def paid(attempt: Attempt, *costs: Cost, details: Mapping[str, Any]) -> Attempt:
    """The same attempt with its cost and details."""
    names = ("calls", "tokens", "seconds")
    total = {name: sum(getattr(cost, name) for cost in costs) for name in names}
    return replace(attempt, details=dict(details), **total)


def tokens_per_candidate(task: SearchTask) -> float:
    """Return what HotFlip feeds to the model per candidate, gradients and races included.

    Measured on a few steps from random tokens, so that it is the same whenever it is asked for.
    """
    kernel = task.kernel()
    generator = task.generator("rate", 0)
    with costing(task.lm) as cost:
        found = hotflip(
            kernel,
            task.bound,
            task.bound.random_slot(task.k, generator),
            steps=RATE_STEPS,
            top_k=task.settings.top_k,
            generator=generator,
        )
    return (cost.tokens + kernel.counts.draft_tokens) / max(1, found.scored)


def hotflip_random(task: SearchTask, restart: int, budget: int) -> Attempt:
    """Pure HotFlip from random tokens, again from others until the budget is spent.

    The budget is in candidates to score, worth the tokens of the pipeline in the same restart; not
    in tokens fed: what a resumed descent feeds again would count twice. What comes out is the best
    of the descents on the training rows, at the cost of all of them.
    """
    found: list[Attempt] = []
    scored, steps = 0, task.settings.flip_steps
    while not found or (scored < budget and len(found) < ROUNDS):
        tag = f".{len(found)}" if found else ""
        start = task.random_slot(f"hotflip_random start{tag}", restart)
        found.append(descent_stage(task, "hotflip_random", restart, start, steps, tag))
        scored += found[-1].details["scored"]
    best = min(found, key=lambda attempt: attempt.train)
    more = {"descents": len(found), "budget": budget, "scored": scored}
    costs = [Cost(each.calls, each.tokens, each.seconds) for each in found]
    return paid(best, *costs, details={**best.details, **more})


def hotflip_reference(task: SearchTask, restart: int) -> Attempt:
    """Pure HotFlip from the reference's own tokens, repeated or cut to k and made legal first."""
    start = [task.reference[i % len(task.reference)] for i in range(task.k)]
    return descent_stage(task, "hotflip_reference", restart, start, task.settings.flip_steps)


def gcg_random(task: SearchTask, restart: int) -> Attempt:
    """GCG from random tokens, as published: the best candidate of each step, even where worse."""
    settings, start = task.settings, task.random_slot("gcg start", restart)
    width, top_k = settings.gcg_width, max(settings.top_k, settings.gcg_width)
    return descent_stage(
        task, "gcg", restart, start, settings.gcg_steps, descend=gcg, width=width, top_k=top_k
    )


def random_tokens(task: SearchTask, restart: int) -> Attempt:
    """Random allowed tokens: the null of every other arm."""
    return _as_it_is(task, "random", restart, task.random_slot("random", restart))


def reference_itself(task: SearchTask) -> Attempt:
    """The reference, which breaks the constraints by design and is what they are to match."""
    return _as_it_is(task, "reference", 0, task.reference)


def _as_it_is(task: SearchTask, arm: str, restart: int, ids: tuple[int, ...]) -> Attempt:
    with costing(task.lm) as cost:
        loss = task.loss(task.rows, ids)
    return paid(task.attempt(arm, restart, ids, loss), cost, details={})


def soft_entry(soft: Soft) -> dict[str, Any]:
    """What a journal has to hold of a soft prefix for the later stages, bit for bit."""
    values = soft.vectors.detach().float().cpu().contiguous()
    text = base64.b64encode(values.numpy().tobytes()).decode("ascii")
    packed = {"shape": list(values.shape), "float32": text}
    return {"vectors": packed, "loss": soft.loss, "init": soft.init}


def soft_of(entry: Mapping[str, Any]) -> Soft:
    """Read what `soft_entry` wrote; the training's curve is not kept."""
    packed, loss = entry["vectors"], entry["loss"]
    values = torch.frombuffer(bytearray(base64.b64decode(packed["float32"])), dtype=torch.float32)
    return Soft(values.reshape(packed["shape"]), loss, loss, (), 0, 0, 0.0, entry["init"])
