"""Vector and ablation to weights: exact after a real reload, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from trimtab.levers.conversions.ablation import ablation_to_weights
from trimtab.levers.conversions.vector_to_weights import vector_to_weights
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

POST_NORM = ("gemma2", "gemma3", "olmo2")


def push(lm: LanguageModel, **how: Any) -> VectorSteering:
    c = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    return VectorSteering.from_directions(lm, {1: c}, 0.7, **how)


def test_bias_and_null_block_are_exact() -> None:
    done = vector_to_weights(tiny.language_model("llama"), push(tiny.language_model("llama")))
    routes = {route.asked: route for route in done.routes}
    for name in ("any", "bias", "null_block"):
        difference = routes[name].difference
        assert difference is not None and difference < 1e-4
        assert routes[name].equal_text and not routes[name].refused
    assert routes["bias"].route == "bias" and routes["null_block"].route == "null block"
    assert routes["convert"].refused and routes["convert"].route == ""
    assert done.exact and done.residual is not None and done.residual < 1e-3
    assert done.told == "exact: bias"


@pytest.mark.parametrize("name", POST_NORM)
def test_behind_a_norm_only_the_null_block(name: str) -> None:
    lm = tiny.language_model(name)
    done = vector_to_weights(lm, push(lm), routes=("bias",))
    whole, bias = done.routes
    assert whole.route == "null block" and whole.difference is not None
    assert whole.difference < 1e-3
    assert "no bias" in bias.refused


def test_a_scope_is_refused_with_the_reason(llama: LanguageModel) -> None:
    done = vector_to_weights(llama, push(llama, scope="last"), routes=())
    assert not done.exact and done.residual is None
    assert done.told == "no: weights act on every token alike"
    assert "weights act" in str(done.table())
    assert done.to_dict()["routes"] is not None


def test_planning_alone_measures_nothing(llama: LanguageModel) -> None:
    done = vector_to_weights(llama, push(llama), routes=(), verify=False)
    assert done.exact and done.routes[0].difference is None


def test_ablation_at_every_writer_is_ablation_of_the_stream(lm: LanguageModel) -> None:
    done = ablation_to_weights(lm, push(lm), verify=False)
    assert done.effect > 0.01
    assert done.stream_difference < 1e-4 * max(1.0, done.effect)
    assert done.layer == 1
    post_norm = lm.sites.post_norm
    assert done.in_weights.exact != post_norm
    if post_norm:
        assert "normalizes" in done.in_weights.told


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "granite"])
def test_ablation_survives_a_reload(name: str) -> None:
    lm = tiny.language_model(name)
    done = ablation_to_weights(lm, push(lm))
    route = done.in_weights.routes[0]
    assert route.difference is not None and route.effect is not None
    assert route.difference < 1e-4 < 0.01 < route.effect
    assert route.equal_text
