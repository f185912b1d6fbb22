"""Reads the activations of both sides of a contrast, and measures directions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Example
from trimtab.errors import TrimtabError
from trimtab.methods.registry import Found, Position, Task
from trimtab.models.capture import capture
from trimtab.models.chat import Encoded

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
    position = _checked(task.position)
    asked = list(task.layers if layers is None else layers)
    behavior = task.behavior
    examples = (*behavior.toward, *behavior.away)
    encoded, note = _encode(task, examples)
    width = abs(position) if isinstance(position, int) else position
    read = capture(task.lm, encoded, asked, positions=width, site=task.site, progress=task.progress)
    values = read.double()  # [examples, layers, positions, d_model]
    n = len(behavior.toward)
    if isinstance(position, int):
        at = 0 if position < 0 else _most_telling(values[:n], values[n:])
        values = values[:, :, at]
        read_at = f"prompt[{at - abs(position)}]"
    else:
        values = values.mean(2)
        read_at = {
            "last": "prompt[-1]",
            "post_instruction": f"mean of the {read.shape[2]} post_instruction tokens",
            "answer": f"mean over the answer ({note})",
        }[position]
    return Contrast(
        toward={layer: values[:n, i] for i, layer in enumerate(asked)},
        away={layer: values[n:, i] for i, layer in enumerate(asked)},
        paired=behavior.paired,
        read_at=read_at,
    )


def _checked(position: Position) -> Position:
    number = isinstance(position, int) and not isinstance(position, bool) and position != 0
    if not number and position not in ("last", "post_instruction", "answer"):
        raise TrimtabError(
            f"to read at the position {position!r}",
            "no such position",
            "use last, post_instruction, answer, k (the best of the last k prompt positions) or -k",
        )
    return position


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


def _most_telling(toward: Tensor, away: Tensor) -> int:
    """Return the index of the position with the largest class gap in units of the spread inside.

    Averaged over layers: sum over dimensions of (mean difference)^2 over that of the variances
    inside the sides, `[n, layers, positions, d_model]` each.
    """
    gap = (toward.mean(0) - away.mean(0)).square().sum(-1)
    inside = toward.var(0, correction=0).sum(-1) + away.var(0, correction=0).sum(-1)
    floor = torch.finfo(torch.float32).eps * toward.square().sum(-1).mean(0)
    return int((gap / (inside + floor)).mean(0).argmax())
