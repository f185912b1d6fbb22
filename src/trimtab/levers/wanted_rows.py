"""The answers that every trained lever is trained on: the same requests, the same wanted answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.behaviors.behavior import Behavior
from trimtab.methods.registry import Task
from trimtab.methods.wanted import own_answers, wanted_answers
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.steering.norms import Norms
from trimtab.steering.scope import Scope


@dataclass(frozen=True)
class Wanted:
    """Training texts of one side.

    Attributes:
        answers: requests with the answers wanted, cut to the trained length.
        prompts: their requests.
        targets: the answers' tokens.
        kept: prompts that already show the behavior with the model's own answers.
        sources: where the wanted answers come from.
    """

    answers: tuple[Encoded, ...]
    prompts: tuple[Prompt, ...]
    targets: tuple[tuple[int, ...], ...] = field(repr=False)
    kept: tuple[Encoded, ...] = ()
    sources: dict[str, int] = field(default_factory=dict)


def wanted_texts(
    lm: LanguageModel,
    behavior: Behavior,
    sign: int = 1,
    tokens: int = 32,
    kept: bool = True,
) -> Wanted:
    """Collect what `find(..., "next_token")` trains on (methods/wanted.py).

    Args:
        lm: the unsteered model.
        behavior: a split.
        sign: +1: answers that show the behavior, -1 its opposite.
        tokens: only so many first tokens of an answer.
        kept: whether to answer the prompts that already show it, too.

    Raises:
        TrimtabError: no wanted answers; says what to supply.
    """
    task = Task(
        lm=lm,
        behavior=behavior,
        site="resid_post",
        layers=tuple(range(lm.n_layers)),
        active=None,
        position="last",
        scope=Scope.parse("all"),
        norms=Norms({}, 0, lm.d_model),
        seed=0,
        progress=None,
    )
    found = wanted_answers(task, sign, tokens=tokens, completions=None, source="auto", judge=None)
    shown = behavior.toward if sign > 0 else behavior.away
    return Wanted(
        answers=found.encoded,
        prompts=tuple(example.prompt for example in found.examples),
        targets=tuple(tuple(item.ids[item.prompt_length :]) for item in found.encoded),
        kept=own_answers(task, shown, tokens).encoded if kept else (),
        sources=dict(found.sources),
    )
