"""The answers that a trained vector should bring about, and those it should leave alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.behaviors.behavior import Example
from trimtab.behaviors.parts import examples_at
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import Judge, Verdict
from trimtab.methods.registry import Task
from trimtab.models.chat import Encoded, Prompt
from trimtab.steering.prompt import PromptSteering

SOURCES = ("auto", "prompted", "paired")
# A greedy answer is generated a little longer than it is trained on, so that an answer that was cut
# off is never followed by a wrong end-of-turn token within the trained part.
SLACK = 8


@dataclass(frozen=True)
class Answered:
    """Prompts with answers, cut to the trained length, and how many came from where.

    Attributes:
        encoded: the answered prompts.
        sources: where answers came from -> how many.
        examples: what was asked, in the order of `encoded`.
    """

    encoded: tuple[Encoded, ...]
    sources: Mapping[str, int]
    examples: tuple[Example, ...] = ()


def wanted_answers(
    task: Task,
    sign: int,
    tokens: int,
    completions: Sequence[Any] | None = None,
    source: str = "auto",
    judge: Judge | None = None,
) -> Answered:
    """Return the requests of one side with answers of the other.

    For sign +1 the requests are the away prompts and their answers should show the behavior. Each
    request takes the first of: its answer in `completions`; the completion of its paired example;
    the model's own greedy answer under `prompt_toward` as a system prompt (source `auto` or
    `prompted`); the model's own answer to its paired prompt (`paired`, or `auto` with a judge).
    Own answers that the judge does not call toward are left out. For -1 all sides are swapped. A
    behavior with `requests` of its own is asked those, for either sign.

    Raises:
        TrimtabError: when no request has an answer; says what to supply.
    """
    behavior = task.behavior
    asked, partners = behavior.away, behavior.toward
    system, side = behavior.prompt_toward, "toward"
    if sign < 0:
        asked, partners = partners, asked
        system, side = behavior.prompt_away, "away"
    paired = behavior.paired and not behavior.requests
    asked = behavior.requests or asked
    given = {} if completions is None else _given(completions)
    answers: list[str | None] = [given.get(example.key) for example in asked]
    sources = Counter({"given": sum(answer is not None for answer in answers)})
    rejected = 0

    def fill(name: str, own: Callable[[list[int]], list[str]], judged: bool) -> None:
        nonlocal rejected
        open_ = [i for i, answer in enumerate(answers) if answer is None]
        if not open_:
            return
        texts = own(open_)
        kept = [bool(text.strip()) for text in texts]
        if judged and judge is not None:
            verdicts = judge([asked[i].prompt for i in open_], texts)
            pairs = zip(kept, verdicts, strict=True)
            kept = [k and _shows(v, sign) for k, v in pairs]
        for i, text, good in zip(open_, texts, kept, strict=True):
            if good:
                answers[i] = text
        sources[name] += sum(kept)
        rejected += len(kept) - sum(kept)

    def answer(prompts: list[Prompt]) -> list[str]:
        return task.lm.generate(prompts, max_new_tokens=tokens + SLACK)

    if paired:
        fill("paired completion", lambda at: [partners[i].completion or "" for i in at], False)
        rejected = 0  # nothing was there to reject
    if system is not None and source in ("auto", "prompted"):
        with PromptSteering(system).on(task.lm):
            fill("prompted", lambda at: answer([asked[i].prompt for i in at]), True)
    if paired and (source == "paired" or (source == "auto" and judge is not None)):
        fill("paired prompt", lambda at: answer([partners[i].prompt for i in at]), True)
    encoded = [
        (cut(task.lm.encode(example.prompt, text), tokens), example)
        for example, text in zip(asked, answers, strict=True)
        if text is not None
    ]
    encoded = [pair for pair in encoded if len(pair[0].ids) > pair[0].prompt_length]
    if not encoded:
        tried = f"{rejected} own answers, none of them {side}" if rejected else "no answers"
        raise TrimtabError(
            f"{side} answers to {len(asked)} requests of {behavior.name!r}",
            tried,
            f"give the behavior prompt_{side} (a system prompt the model follows), paired examples "
            f"with completions, or completions=[{{prompt, completion}}]; or find with "
            "wanted='paired' where pairs ask the same",
        )
    texts, examples = zip(*encoded, strict=True)
    return Answered(texts, {name: n for name, n in sources.items() if n}, examples)


def own_answers(task: Task, examples: Sequence[Example], tokens: int) -> Answered:
    """Return prompts with the model's own unsteered greedy answers: what should stay as it is."""
    texts = task.lm.generate([e.prompt for e in examples], max_new_tokens=tokens + SLACK)
    said = [(e, text) for e, text in zip(examples, texts, strict=True) if text.strip()]
    encoded = tuple(cut(task.lm.encode(e.prompt, text), tokens) for e, text in said)
    return Answered(encoded, {"own": len(encoded)}, tuple(e for e, _ in said))


def _given(completions: Sequence[Any]) -> dict[str, str]:
    examples = examples_at(completions, "completions")
    missing = [e for e in examples if e.completion is None]
    if missing:
        raise TrimtabError(
            "the completions of wanted answers",
            f"{len(missing)} of {len(examples)} without a completion",
            'give [{"prompt": ..., "completion": ...}, ...]',
        )
    return {example.key: str(example.completion) for example in examples}


def _shows(verdict: Verdict, sign: int) -> bool:
    wanted, other = (verdict.toward, verdict.away)[:: 1 if sign > 0 else -1]
    return wanted >= 0.5 and wanted > other


def cut(encoded: Encoded, tokens: int) -> Encoded:
    """An answered prompt with no more than so many tokens of its answer."""
    end = encoded.prompt_length + tokens
    if len(encoded.ids) <= end:
        return encoded
    stop = min(end, encoded.completion_end or end)
    return replace(encoded, ids=encoded.ids[:end], completion_end=stop)
