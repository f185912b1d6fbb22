"""Finding the levers that no budget shapes yet: prompts, directions and a LoRA, from one train split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trimtab.arguments import Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.levers.lora import train_lora, wanted_answers_of
from trimtab.methods.find import find
from trimtab.methods.registry import METHODS
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.prompts.pipeline.stages import descent_stage, projection_stage, soft_stage
from trimtab.prompts.pipeline.task import SearchTask, Settings
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.rows import PromptRow, lay_out
from trimtab.results import Progress
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering

SCOPES = ("all", "last")
USUAL = ("mean_difference", "next_token")
SLOT = "prefix"
SIDES = ("toward", "away", "requests")


@dataclass(frozen=True)
class Effort:
    """How much is spent on finding.

    Attributes:
        methods: of `find`, all of whose vectors are candidates.
        prompt_tokens: of the soft and of the searched prompt.
        restarts: of the prompt search.
        search_requests: train requests a prompt is searched on.
        soft_steps: of the soft prompt.
        repair_steps: of HotFlip.
        vector_steps: of a trained vector.
        lora_rank: of the LoRA.
        lora_steps: of its training.
    """

    methods: tuple[str, ...] = USUAL
    prompt_tokens: int = 4
    restarts: int = 1
    search_requests: int = 6
    soft_steps: int = 40
    repair_steps: int = 12
    vector_steps: int = 80
    lora_rank: int = 4
    lora_steps: int = 40


@dataclass(eq=False)
class FoundLevers:
    """Levers found on the train split, before any is put at a strength.

    Attributes:
        behavior: its name.
        sign: +1 toward, -1 away.
        seed: of the split.
        plain: the behavior's own instruction prompt; None without one.
        searched: a prompt found by search, or the one that was given.
        soft: the soft prompt.
        vectors: scope -> candidates.
        lora: the trained adapter.
        calls: what each cost, rows put through the model.
        missing: what is not there, and why.
    """

    behavior: str
    sign: int
    seed: int
    plain: PromptSteering | None = None
    searched: PromptSteering | None = None
    soft: PromptSteering | None = None
    vectors: dict[str, tuple[VectorSteering, ...]] = field(default_factory=dict)
    lora: WeightSteering | None = None
    calls: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def counted(self, lm: LanguageModel, *names: str) -> Iterator[None]:
        """Add up the calls made inside; a refusal says why the named levers are missing."""
        with counting(lm) as calls:
            try:
                yield
            except TrimtabError as error:
                self.missing |= dict.fromkeys(names, error.found)
        for name in names:
            self.calls[name] = self.calls.get(name, 0) + calls.rows


def find_levers(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    direction: Side = "toward",
    vector: VectorSteering | None = None,
    prompt: PromptSteering | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FoundLevers:
    """Find what `compare_levers` compares; the result serves any number of budgets.

    The arguments are those of `compare_levers`. The behavior is split here, and only its train and
    validation prompts are looked at; a given vector is taken with both scopes.

    Raises:
        TrimtabError: a behavior that cannot be split, or an unknown method. What cannot be found is
            in `missing`.
    """
    spend = effort or Effort()
    for method in spend.methods:
        METHODS.get(method)
    found = FoundLevers(behavior.name, sign_of(direction), seed)
    text = behavior.prompt_toward if found.sign > 0 else behavior.prompt_away
    found.plain = None if text is None else PromptSteering(text)
    found.searched = prompt
    steps: list[Callable[[], None]] = [
        *(lambda s=scope: _vectors(lm, behavior, s, vector, found, spend) for scope in SCOPES),
        lambda: _prompts(lm, behavior, found, spend),
        lambda: _lora(lm, behavior, found, spend),
    ]
    for number, step in enumerate(steps, 1):
        step()
        if progress is not None:
            progress(number, len(steps))
    if found.plain is None:
        found.missing["plain"] = "the behavior has no instruction prompt for this side"
    return found


def _vectors(
    lm: LanguageModel,
    behavior: Behavior,
    scope: str,
    given: VectorSteering | None,
    found: FoundLevers,
    spend: Effort,
) -> None:
    """Candidates of one scope: every method that gives a vector for this behavior."""
    if given is not None:
        vector = given.select(scope=scope)
        found.vectors[scope], found.calls[scope] = (vector.at(abs(vector.strength) or 1.0),), 0
        return
    for method in spend.methods:
        options = {}
        if method == "next_token":
            side = "toward" if found.sign > 0 else "away"
            options = {"steps": spend.vector_steps, "direction": side}
        with found.counted(lm, scope):
            made = find(lm, behavior, method, scope=scope, seed=found.seed, **options)
            made = made.at(abs(made.strength))
            found.vectors[scope] = (*found.vectors.get(scope, ()), made)
    if scope in found.vectors:
        found.missing.pop(scope, None)


def _prompts(lm: LanguageModel, behavior: Behavior, found: FoundLevers, spend: Effort) -> None:
    """A soft prompt, and its projection repaired, the best on validation of some restarts."""
    searching, task = found.searched is None, None
    with found.counted(lm, "soft"):
        task = _task(lm, behavior, found, spend)
    best_soft = best_hard = math.inf
    for restart in range(spend.restarts):
        soft = None
        with found.counted(lm, "soft"):
            if task is not None:
                attempt, soft = soft_stage(task, restart)
                if attempt.validation < best_soft:
                    best_soft, found.soft = attempt.validation, soft.lever(lm, SLOT)
        if not searching or task is None or soft is None:
            continue
        with found.counted(lm, "searched"):
            near = projection_stage(task, restart, soft, "projected")
            hard = descent_stage(task, "repaired", restart, near.ids, spend.repair_steps)
            if hard.validation < best_hard:
                best_hard, found.searched = hard.validation, PromptSteering(hard.text, slot=SLOT)
    if searching:  # it starts from the soft prompt
        found.calls["searched"] = found.calls.get("searched", 0) + found.calls["soft"]
        if found.soft is None:
            found.missing["searched"] = found.missing.get("soft", "no soft prompt to start from")


def _task(lm: LanguageModel, behavior: Behavior, found: FoundLevers, spend: Effort) -> SearchTask:
    splits = behavior.split(found.seed)
    rows, held = (
        _rows(lm, part, found.sign, spend.search_requests)
        for part in (splits.train, splits.validation)
    )
    settings = Settings(
        restarts=spend.restarts,
        length=spend.prompt_tokens,
        soft_steps=spend.soft_steps,
        repair_steps=spend.repair_steps,
        seed=found.seed,
        init="random_tokens",
    )
    bound = Constraints().bind(lm, [*rows, *held])
    return SearchTask(lm, rows, held, bound, (), spend.prompt_tokens, settings)


def _rows(lm: LanguageModel, part: Behavior, sign: int, most: int) -> list[PromptRow]:
    """Requests with wanted answers; so many are answered as are used."""
    kept = {name: range(min(most, len(getattr(part, name)))) for name in SIDES}
    _, found = wanted_answers_of(lm, part.select(kept), sign)
    targets = [item.ids[item.prompt_length :] for item in found.encoded]
    return lay_out(lm, [example.prompt for example in found.examples], SLOT, targets=targets)


def _lora(lm: LanguageModel, behavior: Behavior, found: FoundLevers, spend: Effort) -> None:
    calls = 0
    rank, steps = spend.lora_rank, spend.lora_steps
    with found.counted(lm, "lora"):
        made = train_lora(lm, behavior, sign=found.sign, rank=rank, steps=steps, seed=found.seed)
        # Its own count holds the copy's calls as well, which the count on the model does not see.
        found.lora, calls = made.lever, made.calls
    found.calls["lora"] = max(calls, found.calls.get("lora", 0))
