"""A behavior with a known lever: answers that open with Z, pushed at the last layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

import tiny
from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.coherence import Coherence, register_coherence
from trimtab.evaluation.judges import Judge, Verdict, register_judge
from trimtab.levers.lora import all_writers
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering, weight_of, writer_of

WORDS = ("cats", "ferry", "ledger", "pier", "harbor", "noon", "rules", "work", "boat", "sea")
TOKENS = 6


@register_judge("test-opens")
def opens(behavior: Behavior, options: Mapping[str, object]) -> Judge:
    def judge(prompts: Sequence[object], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(float(a.startswith("Z")), float(a.startswith("Q"))) for a in answers]

    return judge


@register_coherence("test-varied")
def varied(behavior: Behavior, options: Mapping[str, object]) -> Coherence:
    """0 for one character over and over, 1 for anything else."""
    return lambda answers: [float(len(set(a)) > 1) for a in answers]


def behavior(n: int = 8, **more: object) -> Behavior:
    chosen = WORDS[:n]
    fields = {
        "toward": [f"Say something about the {word}." for word in chosen],
        "away": [f"How do I find the {word}?" for word in chosen],
        "neutral": [f"Please, the {word}" for word in chosen[:3]],
        "judge": "test-opens",
        "coherence": "test-varied",
        **more,
    }
    return Behavior(**{"name": "opening", **fields})


def push(lm: LanguageModel, scope: str = "prompt", layers: Sequence[int] = (3,)) -> VectorSteering:
    """At the last layer the direction of Z's unembedding minus Q's, elsewhere a random one."""
    z, q = (lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "ZQ")
    rows = lm.model.get_parameter("lm_head.weight").detach()
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(lm.d_model, generator=generator) for layer in range(4)}
    directions[3] = rows[z] - rows[q]
    units = {layer: c / c.norm() for layer, c in directions.items()}
    vector = VectorSteering.from_directions(lm, units, alpha=10.0, scope=scope)
    return vector.select(layers=layers)


def language_model() -> LanguageModel:
    return tiny.language_model("llama")


def low_rank(
    lm: LanguageModel, layers: Sequence[int] = (0, 2), size: float = 0.3, m: float = 1.0
) -> WeightSteering:
    """A random rank-2 update of every output projection of some layers."""
    generator = torch.Generator().manual_seed(0)
    left, right = {}, {}
    for writer in [w for w in all_writers(lm) if w[1] in layers]:
        d, inner = weight_of(writer_of(lm, writer)).shape
        left[writer] = torch.randn(d, 2, generator=generator) * size
        right[writer] = torch.randn(2, inner, generator=generator) * size
    return WeightSteering(left, right, m, fingerprint=lm.fingerprint)


@torch.no_grad()
def merged(lm: LanguageModel, update: WeightSteering) -> LanguageModel:
    """A copy of a model whose weights hold the update, up to one rounding to the model's dtype."""
    made = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.name)
    for writer, b in update.left.items():
        weight = weight_of(writer_of(made, writer))
        change = update.strength * (b.double() @ update.right[writer].double())
        weight.copy_((weight.double().cpu() + change).to(weight.dtype))
    return made
