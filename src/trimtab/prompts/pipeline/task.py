"""What a search works on: its settings, its rows, what a prompt may hold, where chance comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.prompts.discrete.descent import seeded
from trimtab.prompts.pipeline.attempt import Attempt
from trimtab.prompts.projections.project import PROJECTIONS, slot_losses
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.soft.soft import Soft
from trimtab.prompts.task.constraints import Bound
from trimtab.prompts.task.rows import EARLY, EARLY_WEIGHT, PromptRow, slot_text
from trimtab.results.journal import Notes
from trimtab.steering.soft_tokens import soft_tokens

INITS = ("random_tokens", "reference", "alternate")


@dataclass(frozen=True)
class Settings:
    """How a search works; every default is here.

    Attributes:
        restarts: of the pipeline and of each searching baseline.
        compare: whether the baselines search too, on as many tokens: pure HotFlip from random tokens
            and from the reference, nearest neighbors, and GCG. Takes several times as long.
        gcg_restarts: of GCG, which costs most.
        length: tokens of the prompt; that of the reference when None.
        train_requests: so many of the train split are searched on.
        completion_tokens: length of a reference answer.
        early: so many first answer tokens weigh `early_weight`, the others 1.
        early_weight: their weight.
        init: what the soft prefix starts from: `random_tokens`, `reference`, or `alternate`, every
            second restart from the reference.
        soft_steps: of Adam.
        soft_rate: its learning rate, see `train_soft`.
        projection: one of `PROJECTIONS`.
        projection_options: of it.
        repair_steps: of HotFlip after the projection.
        flip_steps: of one descent of a pure HotFlip baseline.
        top_k: replacements scored per place.
        gcg_steps: of GCG.
        gcg_width: its candidates per step.
        answer_tokens: length of a judged answer.
        sampling_seeds: judged answers at temperature 1 per request.
        seed: of everything random.

    Raises:
        TrimtabError: an unusable number or an unknown name.
    """

    restarts: int = 10
    compare: bool = False
    gcg_restarts: int = 1
    length: int | None = None
    train_requests: int = 6
    completion_tokens: int = 24
    early: int = EARLY
    early_weight: float = EARLY_WEIGHT
    init: str = "alternate"
    soft_steps: int = 30
    soft_rate: float = 0.3
    projection: str = "straight_through"
    projection_options: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 3})
    repair_steps: int = 16
    flip_steps: int = 16
    top_k: int = 32
    gcg_steps: int = 16
    gcg_width: int = 64
    answer_tokens: int = 48
    sampling_seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check numbers and names."""
        PROJECTIONS.get(self.projection)
        choice("init", self.init, INITS)
        names = (
            *("restarts", "length", "train_requests", "completion_tokens", "top_k", "gcg_width"),
            *("answer_tokens", "sampling_seeds"),
        )
        counts = {name: getattr(self, name) for name in names}
        wrong = [f"{name}={n}" for name, n in counts.items() if n is not None and n < 1]
        if wrong:
            raise TrimtabError(
                asked=f"a search with {', '.join(wrong)}",
                found="no count",
                advice="give whole numbers from 1",
            )


@dataclass(frozen=True, eq=False)
class SearchTask:
    """What every stage and baseline works on.

    Attributes:
        lm: the model.
        rows: the training rows.
        validation: the rows that select.
        bound: what a prompt may hold.
        reference: the reference's tokens in the slot.
        k: tokens of a prompt.
        settings: of the search.
        journal: where descents write their steps; None for none.
        draft: ranks candidates first, see `Kernel`; one copy for all of them.
    """

    lm: LanguageModel
    rows: Sequence[PromptRow]
    validation: Sequence[PromptRow]
    bound: Bound
    reference: tuple[int, ...]
    k: int
    settings: Settings
    journal: Notes | None = None
    draft: LanguageModel | None = None

    def kernel(self) -> Kernel:
        """A kernel of its own for every attempt, so that costs and memory are that attempt's."""
        return Kernel(self.lm, self.rows, draft=self.draft)

    def generator(self, arm: str, restart: int) -> torch.Generator:
        """The generator of one arm in one restart: none depends on what ran before it."""
        return seeded(self.settings.seed, f"{arm}:{restart}")

    def random_slot(self, arm: str, restart: int) -> tuple[int, ...]:
        """Draw a prompt of allowed tokens."""
        return self.bound.random_slot(self.k, self.generator(arm, restart))

    def loss(self, rows: Sequence[PromptRow], prompt: Sequence[int] | Soft) -> float:
        """The loss over rows of a prompt or a soft prefix."""
        if not isinstance(prompt, Soft):
            return float(slot_losses(self.lm, rows, [prompt])[0])
        with soft_tokens(self.lm, prompt.vectors.to(self.lm.device)) as slot:
            return float(slot_losses(self.lm, rows, [slot])[0])

    def attempt(self, arm: str, restart: int, ids: Sequence[int], train: float) -> Attempt:
        """An attempt that ended with these tokens."""
        violated = self.bound.explain(ids)
        return Attempt(
            arm=arm,
            restart=restart,
            ids=tuple(ids),
            text=slot_text(self.lm, ids),
            train=train,
            violated_start=violated,
            legal=not violated,
            validation=self.loss(self.validation, ids),
        )
