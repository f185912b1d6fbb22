"""Reads the activations of both sides of a contrast, and measures directions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior, Example
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import judge_for
from trimtab.methods.registry import Found, Position, Task
from trimtab.methods.wanted import cut, wanted_answers
from trimtab.models.capture import capture
from trimtab.models.chat import Encoded
from trimtab.results import Progress

# A difference below this share of the activations' length is rounding, not a direction.
SAME = 1e-5
ANSWER_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Contrast:
    """Activations of both sides at one position.

    Attributes:
        toward: layer -> float64 `[n_toward, d_model]`.
        away: layer -> float64 `[n_away, d_model]`.
        paired: row i of both sides belongs together.
        read_at: the position, in words.
    """

    toward: Mapping[int, Tensor]
    away: Mapping[int, Tensor]
    paired: bool
    read_at: str

    def difference(self, layer: int) -> Tensor:
        """Return mean(toward) - mean(away), float64 `[d_model]`."""
        return self.toward[layer].mean(0) - self.away[layer].mean(0)

    @property
    def telling(self) -> list[int]:
        """The layers where the sides differ: at the template's own tokens, the first may not."""
        return [layer for layer in self.toward if self._differs(layer)]

    def _differs(self, layer: int) -> bool:
        both = torch.cat([self.toward[layer], self.away[layer]])
        center = both.mean(0)
        return bool((both - center).norm(dim=1).mean() > SAME * both.norm(dim=1).mean())

    def separation(self) -> float:
        """Return the gap between the sides in units of the spread inside them, its mean over layers.

        sum over dimensions of (mean difference)^2 / that of the variances inside the sides.
        """
        total = 0.0
        for layer, toward in self.toward.items():
            inside = toward.var(0, correction=0).sum() + self.away[layer].var(0, correction=0).sum()
            floor = torch.finfo(torch.float32).eps * toward.square().sum(-1).mean()
            total += float(self.difference(layer).square().sum() / (inside + floor))
        return total / len(self.toward)

    def found(
        self, vectors: Mapping[int, Tensor], details: Mapping[str, object] | None = None
    ) -> Found:
        """Return the result of a method, with the gap and the spread of each direction.

        A vector of zeros has no direction and is left out.
        """
        gaps: dict[int, float] = {}
        spreads: dict[int, float] = {}
        kept = {x: v for x, v in vectors.items() if float(v.norm()) > 0}
        for layer, vector in kept.items():
            c = vector.double() / vector.double().norm()
            toward, away = self.toward[layer] @ c, self.away[layer] @ c
            gaps[layer] = float(toward.mean() - away.mean())
            spreads[layer] = float(torch.cat([toward, away]).std(correction=0))
        return Found(kept, self.read_at, gaps, spreads, details=details or {})


def read_contrast(task: Task, layers: Sequence[int] | None = None) -> Contrast:
    """Read both sides at the task's position, at some layers or all of the task's.

    Raises:
        TrimtabError: a position that the prompts do not have.
    """
    position, behavior = _checked(task.position), task.behavior
    asked = list(task.layers if layers is None else layers)
    if position == "judged_answer":
        toward, away, read_at = _judged(task)
        values = _read(task, [*toward, *away], asked, task.progress).mean(2)
        return _contrast(len(toward), True, asked, values, read_at)
    if position not in ("post_instruction", "answer"):
        there = read_positions(task, behavior, asked, task.progress)
        return max(there.values(), key=Contrast.separation)
    encoded, note = _encode(task, (*behavior.toward, *behavior.away))
    values = _read(task, encoded, asked, task.progress)
    read_at = f"mean of the {values.shape[2]} post_instruction tokens"
    if position == "answer":
        read_at = f"mean over the answer ({note})"
    return _contrast(len(behavior.toward), behavior.paired, asked, values.mean(2), read_at)


def read_positions(
    task: Task, behavior: Behavior, layers: Sequence[int], progress: Progress | None = None
) -> dict[int, Contrast]:
    """Return both sides at every prompt position the task names, counted from the end: -1 is the last."""
    at = task.position
    encoded = [task.lm.encode(e.prompt) for e in (*behavior.toward, *behavior.away)]
    values = _read(task, encoded, layers, progress)
    n, count = len(behavior.toward), values.shape[2]
    chosen = [0] if isinstance(at, int) and at < 0 else range(count)
    return {
        p - count: _contrast(n, behavior.paired, layers, values[:, :, p], f"prompt[{p - count}]")
        for p in chosen
    }


def _read(
    task: Task, encoded: Sequence[Encoded], layers: Sequence[int], progress: Progress | None
) -> Tensor:
    """Return activations, float64 `[examples, layers, positions, d_model]`."""
    at = task.position
    width = abs(at) if isinstance(at, int) else at.removeprefix("judged_")
    read = capture(task.lm, encoded, layers, positions=width, site=task.site, progress=progress)
    return read.double()


def _contrast(
    n: int, paired: bool, layers: Sequence[int], values: Tensor, read_at: str
) -> Contrast:
    """Divide `[examples, layers, d_model]` into the sides; the first n are toward."""
    return Contrast(
        toward={layer: values[:n, i] for i, layer in enumerate(layers)},
        away={layer: values[n:, i] for i, layer in enumerate(layers)},
        paired=paired,
        read_at=read_at,
    )


def _checked(position: Position) -> Position:
    number = isinstance(position, int) and not isinstance(position, bool) and position != 0
    if not number and position not in ("last", "post_instruction", "answer", "judged_answer"):
        raise TrimtabError(
            f"to read at the position {position!r}",
            "no such position",
            "use last, post_instruction, answer, judged_answer, k (the best of the last k prompt "
            "positions) or -k",
        )
    return position


def _judged(task: Task) -> tuple[list[Encoded], list[Encoded], str]:
    """Both answers to each away prompt: one that the judge calls toward, and the model's own.

    The first is written after the toward prompt and read after the away prompt, so that what asked
    for the behavior is gone and the answers alone differ.
    """
    behavior = task.behavior
    if not behavior.paired:
        raise TrimtabError(
            f"to read judged answers of {behavior.name!r}",
            "sides that are not paired",
            "pair each toward prompt with an away prompt that asks the same, or read at answer",
        )
    wanted = wanted_answers(task, 1, ANSWER_TOKENS, source="paired", judge=judge_for(behavior))
    own = task.lm.generate([e.prompt for e in wanted.examples], max_new_tokens=ANSWER_TOKENS)
    plain = [
        cut(task.lm.encode(e.prompt, answer), ANSWER_TOKENS)
        for e, answer in zip(wanted.examples, own, strict=True)
    ]
    pairs = [
        (shown, away)
        for shown, away, answer in zip(wanted.encoded, plain, own, strict=True)
        if answer.strip() and shown.ids != away.ids
    ]
    if not pairs:
        raise TrimtabError(
            f"to read judged answers of {behavior.name!r}",
            f"{len(plain)} answers toward, each the model's own as it is",
            "ask for the behavior in other words",
        )
    toward, away = zip(*pairs, strict=True)
    counts = f"{len(pairs)} of {len(behavior.away)} pairs"
    return (
        list(toward),
        list(away),
        f"mean over the answer, judged, after the same prompt ({counts})",
    )


def _encode(task: Task, examples: Sequence[Example]) -> tuple[list[Encoded], str]:
    """Encode the prompts, with answers where those are read: given ones, else the model's own."""
    if task.position != "answer":
        return [task.lm.encode(example.prompt) for example in examples], ""
    answers = [example.completion for example in examples]
    unanswered = [i for i, answer in enumerate(answers) if answer is None]
    if unanswered:
        prompts = [examples[i].prompt for i in unanswered]
        own = task.lm.generate(prompts, max_new_tokens=ANSWER_TOKENS)
        for i, answer in zip(unanswered, own, strict=True):
            answers[i] = answer
    empty = sum(not (answer or "").strip() for answer in answers)
    if empty:
        raise TrimtabError(
            "the mean over the answers",
            f"{empty} of {len(answers)} prompts that the model answers with nothing",
            "give completions, or read at last",
        )
    given = len(answers) - len(unanswered)
    encoded = [task.lm.encode(e.prompt, a) for e, a in zip(examples, answers, strict=True)]
    return encoded, f"{given} given, {len(unanswered)} the model's own"
