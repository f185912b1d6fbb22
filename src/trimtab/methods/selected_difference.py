"""The difference of means at the one position and layer whose direction does what it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor

from trimtab.behaviors.behavior import EXAMPLE_LISTS, Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import token_kl
from trimtab.evaluation.readout import gap_of, readout_tokens
from trimtab.methods.contrast import read_positions
from trimtab.methods.registry import Found, Task, register
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.results.journal import Notes
from trimtab.steering.hooks import Edit, steered
from trimtab.steering.scope import Scope

# The stream is their sum, so a direction that is taken out of all of them is nowhere in it.
ABLATED = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True)
class PositionCandidate:
    """One direction and its scores on held-out prompts.

    Attributes:
        position: counted from the end of the prompt, -1 is its last token.
        layer: 0-based.
        bypass: mean gap on toward prompts with the direction ablated everywhere, nats; low is good.
        induce: mean gap on away prompts with the difference added at its layer, nats; high is good.
        kl: mean KL(unsteered || ablated) at the first answer position of neutral prompts, nats.
    """

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float


@register(
    "selected_difference",
    aliases=("refusal_direction",),
    read_at="post_instruction",
    added_at="post_instruction",
    parts=True,
)
def selected_difference(
    task: Task,
    *,
    held_out: float = 0.25,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    deepest: float = 0.8,
    max_prompts: int = 32,
) -> Found:
    """Find mean(toward) - mean(away) at every position and layer, and keep one of them.

    Candidates are scored on prompts that the means did not see: ablated from the whole stream it
    should take the behavior away (bypass) and leave neutral prompts alone (KL), added at its layer
    it should bring the behavior about (induce). Of those that pass, the lowest bypass wins. Added
    as it is, it has the strength |difference| in units of mu_l / sqrt(d_model).

    Source: the selection of Arditi et al., 2024 (arXiv 2406.11717), appendix C, with the readout gap
    as the score.

    Args:
        task: what to find it from; its position says which positions are candidates: all
            `post_instruction` tokens, the `last`, the last k, or exactly the k-th from the end (-k).
        held_out: share of the examples that selects.
        max_kl: greatest KL, nats.
        min_induce: least gap that adding has to reach, nats.
        deepest: layers from this share of the depth on are no candidates, unless one is named.
        max_prompts: at most so many held-out prompts a side.

    Raises:
        TrimtabError: no readout words, too few examples to hold some out, several layers named, no
            such position, or no candidate that passes.
    """
    _check(task, held_out, deepest, max_prompts)
    readout_tokens(task.lm, task.behavior)  # refuses before anything is read
    finding, judging = _parts(task.behavior, held_out, task.seed)
    layers = task.active or tuple(x for x in task.layers if x < int(deepest * task.lm.n_layers))
    contrasts = read_positions(task, finding, layers or (0,))
    make = partial(
        _Selection, site=task.site, scope=task.scope, part=judging, max_prompts=max_prompts
    )
    selection = make(task.lm)
    places = [(p, x) for p, contrast in contrasts.items() for x in contrast.telling]
    units = [partial(_scored, p, x, contrasts[p].difference(x)) for p, x in places]
    count = iter(range(1, len(places) + 1))

    def done(number: int, candidate: PositionCandidate) -> None:
        if task.progress is not None:
            task.progress(next(count), len(places))

    scored = (task.engine or Engine(task.lm)).map(Job(selection, make), units, done=done)
    passed = [c for c in scored if c.kl <= max_kl and c.induce >= min_induce]
    if not passed:
        raise _refusal(task, scored, max_kl, min_induce)
    passed.sort(key=lambda c: c.bypass)
    best = passed[0]
    contrast = contrasts[best.position]
    difference = contrast.difference(best.layer)
    found = contrast.found({best.layer: difference})
    return replace(
        found,
        strength=float(difference.norm()) / task.norms.scales[best.layer],
        details={
            "selected": asdict(best),
            "unsteered": selection.unsteered,
            "candidates": len(scored),
            "passed": len(passed),
            "runners_up": [asdict(c) for c in passed[1:4]],
            "held_out": {name: len(prompts) for name, prompts in selection.prompts.items()},
        },
    )


class _Selection:
    """Scores directions on held-out prompts."""

    def __init__(
        self, lm: LanguageModel, site: str, scope: Scope, part: Behavior, max_prompts: int
    ) -> None:
        self.lm, self.site, self.scope = lm, site, scope
        self.tokens = readout_tokens(lm, part)
        lists = {
            "toward": part.toward,
            "away": part.requests or part.away,
            "neutral": part.neutral or part.away,
        }
        self.prompts = {k: [e.prompt for e in v[:max_prompts]] for k, v in lists.items()}
        logits = {name: self._logits(name) for name in self.prompts}
        self.reference = logits["neutral"].log_softmax(-1)
        self.unsteered = {name: self._gap(logits[name]) for name in ("toward", "away")}

    def score(self, position: int, layer: int, difference: Tensor) -> PositionCandidate:
        """Score one difference `[d_model]`."""
        lm, length = self.lm, float(difference.norm())
        unit = (difference / length).float()
        kinds = [kind for kind in ABLATED if kind not in lm.sites.refused]
        everywhere = [
            Edit(Site(kind, at), "ablate", unit, 1.0) for at in range(lm.n_layers) for kind in kinds
        ]
        add = Edit(Site(self.site, layer), "add", unit, length, scope=self.scope)
        ablated = self._logits("neutral", everywhere).log_softmax(-1)
        return PositionCandidate(
            position=position,
            layer=layer,
            bypass=self._gap(self._logits("toward", everywhere)),
            induce=self._gap(self._logits("away", [add])),
            kl=float(token_kl(self.reference, ablated).mean()),
        )

    def _logits(self, name: str, edits: Sequence[Edit] = ()) -> Tensor:
        with steered(self.lm, edits) if edits else nullcontext():
            return self.lm.next_logits(self.prompts[name])

    def _gap(self, logits: Tensor) -> float:
        return float(gap_of(logits.double(), self.tokens).mean())


def _scored(
    position: int, layer: int, difference: Tensor, selection: _Selection, notes: Notes
) -> PositionCandidate:
    return selection.score(position, layer, difference)


def _parts(behavior: Behavior, held_out: float, seed: int) -> tuple[Behavior, Behavior]:
    """Return the examples to find from and those that select; pairs and repeats stay together."""
    splits = behavior.split(seed, (1 - held_out, held_out / 2, held_out / 2))
    one, two = splits.validation.to_dict(), splits.test.to_dict()
    both = {name: [*one[name], *two[name]] for name in EXAMPLE_LISTS}
    return splits.train, Behavior(**{**one, **both})


def _check(task: Task, held_out: float, deepest: float, max_prompts: int) -> None:
    if len(task.active or ()) > 1:
        raise TrimtabError(
            f"a selected difference for the layers {list(task.active or ())}",
            "a method that keeps one layer",
            "name one layer, or none to let the scores choose",
        )
    if task.position == "answer":
        raise TrimtabError(
            "a selected difference read at answer",
            "candidates that are positions of the prompt",
            "use post_instruction, last, k or -k; mean_difference reads answers",
        )
    if not (0 < held_out < 1 and 0 < deepest <= 1 and max_prompts >= 1):
        raise TrimtabError(
            "a selected difference",
            f"held_out={held_out}, deepest={deepest}, max_prompts={max_prompts}",
            "use shares above 0 (held_out below 1) and at least one prompt",
        )


def _refusal(
    task: Task, scored: Sequence[PositionCandidate], max_kl: float, min_induce: float
) -> TrimtabError:
    asked = f"a selected difference of {task.behavior.name!r} among {len(scored)} candidates"
    finite = [c for c in scored if math.isfinite(c.kl) and math.isfinite(c.induce)]
    if not finite:
        return TrimtabError(
            asked,
            "sides that cannot be told apart, or scores that are not finite",
            "read elsewhere (position=), or load the model in float32 or bfloat16",
        )
    calm, strong = min(finite, key=lambda c: c.kl), max(finite, key=lambda c: c.induce)
    return TrimtabError(
        asked,
        f"none with kl <= {max_kl:g} and induce >= {min_induce:g}; the lowest kl is {calm.kl:.3g} "
        f"(layer {calm.layer}, position {calm.position}, induce {calm.induce:.3g}), the highest "
        f"induce {strong.induce:.3g} (layer {strong.layer}, position {strong.position}, kl "
        f"{strong.kl:.3g})",
        "raise max_kl, lower min_induce, or use mean_difference, which selects nothing",
    )
