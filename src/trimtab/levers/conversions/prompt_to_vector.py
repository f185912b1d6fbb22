"""Prompt to vector: the mean change of the stream that a prompt makes, and what no vector can do.

At every token that stands after the prompt in both readings (the request's, the template's and the
answer's tokens),

    D_ip = h_l(with the prompt) - h_l(without),     v = mean of D over train requests
    explained = 1 - sum |D_ip - v|^2 / sum |D_ip|^2 over held-out requests and positions

The rest is what depends on the request or the position: no constant vector has it. Derivation:
docs/levers.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize, token_kl
from trimtab.levers.conversions.conversion import Conversion, Setting, explained
from trimtab.levers.conversions.recovered import Recovered
from trimtab.models.capture import capture
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.teacher import answers_as_ids, switched
from trimtab.results.tables import Table, number
from trimtab.steering.norms import calibrate
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Switch, VectorSteering
from trimtab.strength.place import Placed, place

ANSWER = 16  # answer tokens that are read
_SHOWN = ("length", "explained", "last", "last_own", "answer", "ceiling")


@dataclass(frozen=True)
class LayerExplained:
    """How well one constant stands for what the prompt does at a layer.

    Attributes:
        layer: 0-based.
        length: |v| over the mean |D|, both on held-out requests.
        explained: share of the held-out displacement that v explains, all positions in scope.
        last: the same at the last prompt token alone.
        last_own: there, what the train requests' mean of that one position explains: 1 - last_own
            depends on the request, the rest of the residual on the position.
        answer: the same at the answer's tokens.
        ceiling: the same for the held-out positions' own mean, the best constant there is.
        kl: mean KL in nats on validation prompts from the prompt's next-token distribution to the
            vector's, the vector added there at m = 1.
    """

    layer: int
    length: float
    explained: float
    last: float
    last_own: float
    answer: float
    ceiling: float
    kl: float


@dataclass(frozen=True, eq=False)
class PromptAsVector(Conversion):
    """A prompt as a vector, with its residual.

    Attributes:
        lever: the mean displacement at the layer of least KL; m = 1 adds it as it is.
        layers: every layer's figures.
        recovered: at its own length on test prompts.
        placed: the strength at which the vector does as much damage as the prompt (p95, validation).
        recovered_placed: there.
        unsteered_kl: mean KL from the prompt's next-token distribution to the unsteered one's, the
            null of `LayerExplained.kl`.
    """

    lever: VectorSteering
    layers: tuple[LayerExplained, ...]
    recovered: Recovered
    placed: Placed
    recovered_placed: Recovered
    unsteered_kl: float
    lost = "unexplained share of its displacement, held-out requests"

    @property
    def residual(self) -> float:
        """The share of the displacement at the chosen layer that is not explained."""
        chosen = self.lever.layers[0]
        return 1 - next(row.explained for row in self.layers if row.layer == chosen)

    def figures(self) -> Table:
        columns = (
            *("layer", "|v| / mean |D|", "explained", "last", "last, own mean", "answer"),
            *("ceiling", "KL"),
        )
        rows = tuple(
            (
                str(row.layer),
                *(number(getattr(row, name)) for name in _SHOWN),
                number(row.kl, 3),
            )
            for row in self.layers
        )
        notes = (
            f"chosen: layer {self.lever.layers[0]}, scope {self.lever.scope}; KL to the prompt "
            f"unsteered {number(self.unsteered_kl, 3)}",
            f"at equal damage m = {self.placed.strength:.3g} ({self.placed.limited_by}): "
            f"recovered {self.recovered_placed.told}",
        )
        return Table("prompt to vector", columns, rows, notes)


def prompt_to_vector(
    setting: Setting,
    lever: PromptSteering,
    *,
    scope: str = "all",
    layers: Sequence[int] | None = None,
) -> PromptAsVector:
    """Convert a prompt, hard or soft, into the mean change it makes to the stream.

    The mean is of train prompts, the layer is chosen on validation prompts, what is reported is of
    test prompts. Scope `all` gives one vector for every token; `last` one for the last prompt token
    and the answer's, the mean of those positions alone. All `layers` are looked at by default.

    Raises:
        TrimtabError: a prompt that leaves no token in common.
    """
    choice("scope", scope, ("all", "last"))
    lm, seed, validation = setting.lm, setting.seed, setting.validation
    chosen = tuple(range(lm.n_layers)) if layers is None else tuple(layers)
    fitted, held = (
        displacements(lm, lever, setting.prompts(part), chosen).within(scope)
        for part in (setting.train(24), setting.test)
    )
    means = {layer: torch.cat(fitted.values[layer]).mean(0) for layer in chosen}
    norms = calibrate(lm).mean
    note = {"method": "prompt to vector", "prompt": lever.label}
    vectors: dict[int, VectorSteering] = {}
    for layer, v in means.items():
        made = VectorSteering.from_directions(lm, {layer: v}, scope=scope)
        vectors[layer] = replace(made, norms={layer: norms[layer]}, provenance=note)
    prompts = setting.prompts(validation)
    wanted = _next(lm, prompts, lever)
    rows = tuple(
        _explained(layer, fitted, held, _kl(lm, prompts, vectors[layer], wanted))
        for layer in chosen
    )
    vector = vectors[min(rows, key=lambda row: row.kl).layer]
    shown = "toward" if setting.sign > 0 else "away"
    reference = Reference(lm, validation.prompts(shown), validation.unsteered(shown))
    budget = max(summarize(reference.kl(lever), seed).p95, 1e-6)
    placed = place(reference, vector, budget, seed=seed)
    null = setting.null(vector)
    found = [
        setting.recovered(lever, v, null.at(v.strength))
        for v in (vector, vector.at(placed.strength))
    ]
    return PromptAsVector(vector, rows, found[0], placed, found[1], _kl(lm, prompts, None, wanted))


@dataclass(frozen=True, eq=False)
class Displaced:
    """What a prompt does to the stream at the tokens after it.

    Attributes:
        values: layer -> per request h(with) - h(without), float32 `[tokens, d_model]`.
        answers: per request, how many of the last tokens are the answer's.
    """

    values: dict[int, list[Tensor]]
    answers: tuple[int, ...]

    def within(self, scope: str) -> Displaced:
        """Return the positions that a scope covers: `all` of them, or the `last` prompt token on."""
        if scope == "all":
            return self
        cut = {
            layer: [d[-1 - n :] for d, n in zip(values, self.answers, strict=True)]
            for layer, values in self.values.items()
        }
        return Displaced(cut, self.answers)

    def last(self, layer: int) -> Tensor:
        """Return the displacement at each request's last prompt token, float64 `[n, d_model]`."""
        pairs = zip(self.values[layer], self.answers, strict=True)
        return torch.stack([d[-1 - count] for d, count in pairs]).double()


def displacements(
    lm: LanguageModel, lever: PromptSteering, prompts: Sequence[Prompt], layers: Sequence[int]
) -> Displaced:
    """Read the stream with and without a prompt, at the tokens that both readings share.

    They are counted from the end, and end with the first `ANSWER` tokens of the answer that the
    model gives under the prompt.

    Raises:
        TrimtabError: no token in common.
    """
    answers = answers_as_ids(lm, lever, prompts, ANSWER)
    plain = [_whole(lm.encode(p), ids) for p, ids in zip(prompts, answers, strict=True)]
    with switched(lm, lever):
        steered = [_whole(lm.encode(p), ids) for p, ids in zip(prompts, answers, strict=True)]
        shared = [_shared(a.ids, b.ids) for a, b in zip(plain, steered, strict=True)]
        there = _read(lm, steered, shared, layers)
    rest = _read(lm, plain, shared, layers)
    values = {
        layer: [a - b for a, b in zip(there[layer], rest[layer], strict=True)] for layer in layers
    }
    counts = tuple(min(len(ids), n - 1) for ids, n in zip(answers, shared, strict=True))
    return Displaced(values, counts)


def _whole(prompt: Encoded, answer: Sequence[int]) -> Encoded:
    """A prompt with its answer, all of it to be read; `instruction_end` keeps where the answer began."""
    ids = [*prompt.ids, *answer]
    return Encoded(prompt.text, ids, len(ids), len(prompt.ids))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their ends, the whole of neither."""
    most = min(len(one), len(other))
    alike = next((i for i in range(most) if one[-1 - i] != other[-1 - i]), most)
    if alike == 0:
        raise TrimtabError(
            "the change that a prompt makes", "no token after it in common", "use another slot"
        )
    return alike


def _read(
    lm: LanguageModel, encoded: Sequence[Encoded], counts: Sequence[int], layers: Sequence[int]
) -> dict[int, list[Tensor]]:
    """The stream at each text's last `counts` tokens, those of one count in common batches."""
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(encoded) for layer in layers}
    for count in sorted(set(counts)):
        places = [i for i, n in enumerate(counts) if n == count]
        read = capture(lm, [encoded[i] for i in places], layers, positions=count)
        for row, at in enumerate(places):
            for column, layer in enumerate(layers):
                found[layer][at] = read[row, column]
    return found


def _explained(layer: int, fitted: Displaced, held: Displaced, kl: float) -> LayerExplained:
    v = torch.cat(fitted.values[layer]).double().mean(0)
    every = torch.cat(held.values[layer]).double()
    pairs = list(zip(held.values[layer], held.answers, strict=True))
    last = held.last(layer)
    answer = torch.cat([d[len(d) - count :] for d, count in pairs]).double()
    return LayerExplained(
        layer=layer,
        length=float(v.norm() / every.norm(dim=-1).mean()),
        explained=explained(every, v),
        last=explained(last, v),
        last_own=explained(last, fitted.last(layer).mean(0)),
        answer=explained(answer, v),
        ceiling=explained(every, every.mean(0)),
        kl=kl,
    )


def _next(lm: LanguageModel, prompts: Sequence[Prompt], lever: Switch | None) -> Tensor:
    with switched(lm, lever):
        return lm.next_logits(list(prompts)).log_softmax(-1)


def _kl(
    lm: LanguageModel, prompts: Sequence[Prompt], lever: Switch | None, wanted: Tensor
) -> float:
    return float(token_kl(wanted, _next(lm, prompts, lever)).mean())
