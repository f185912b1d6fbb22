"""What the pipeline is measured against, in the same run and with at least its tokens."""

from __future__ import annotations

from trimtab.prompts.discrete.gcg import gcg
from trimtab.prompts.discrete.hotflip import hotflip
from trimtab.prompts.pipeline.attempt import Attempt, Cost, costing
from trimtab.prompts.pipeline.stages import descent_stage, paid
from trimtab.prompts.pipeline.task import Task

ROUNDS = 50  # descents of one restart at most, whatever the budget
RATE_STEPS = 4


def tokens_per_candidate(task: Task) -> float:
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


def hotflip_random(task: Task, restart: int, budget: int) -> Attempt:
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


def hotflip_reference(task: Task, restart: int) -> Attempt:
    """Pure HotFlip from the reference's own tokens, made legal first."""
    start = task.cut(task.reference)
    return descent_stage(task, "hotflip_reference", restart, start, task.settings.flip_steps)


def gcg_random(task: Task, restart: int) -> Attempt:
    """GCG from random tokens, as published: the best candidate of each step, even where worse."""
    settings, start = task.settings, task.random_slot("gcg start", restart)
    width, top_k = settings.gcg_width, max(settings.top_k, settings.gcg_width)
    return descent_stage(
        task, "gcg", restart, start, settings.gcg_steps, descend=gcg, width=width, top_k=top_k
    )


def random_tokens(task: Task, restart: int) -> Attempt:
    """Random allowed tokens: the null of every other arm."""
    return _as_it_is(task, "random", restart, task.random_slot("random", restart))


def reference_itself(task: Task) -> Attempt:
    """The reference, which breaks the constraints by design and is what they are to match."""
    return _as_it_is(task, "reference", 0, task.reference)


def _as_it_is(task: Task, arm: str, restart: int, ids: tuple[int, ...]) -> Attempt:
    with costing(task.lm) as cost:
        loss = task.loss(task.rows, ids)
    return paid(task.attempt(arm, restart, ids, loss), cost, details={})
