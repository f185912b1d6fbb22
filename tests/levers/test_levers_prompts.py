"""Prompt to vector, vector to soft prompt, vector to hard prompt: residuals against plain reckoning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import planted
import tiny
from trimtab.errors import TrimtabError
from trimtab.levers.conversions.convert import convert
from trimtab.levers.conversions.prompt_to_vector import displacements
from trimtab.levers.conversions.vector_to_prompt import pull_back
from trimtab.levers.conversions.vector_to_soft import induced, match
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.prompts.soft.embeddings import token_embeddings
from trimtab.prompts.soft.states import states
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.rows import lay_out
from trimtab.steering.prompt import PromptSteering, prompt
from trimtab.steering.vector import VectorSteering

WORDS = {"toward": ["Z"], "away": ["Q"]}
SMALL: dict[str, Any] = {"max_prompts": 3, "max_new_tokens": 4}
REQUESTS = ["How do I find the pier?", "Cats?"]


def push(lm: LanguageModel, scope: str = "all", layer: int = 1) -> VectorSteering:
    c = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    return VectorSteering.from_directions(lm, {layer: c}, 0.6, scope=scope)


def test_displacements_are_the_plain_difference(lm: LanguageModel) -> None:
    lever = prompt("Say Z.", "prefix")
    found = displacements(lm, lever, REQUESTS, [0, 2])
    for row, request in enumerate(REQUESTS):
        with lever.on(lm):
            there = capture(lm, [lm.encode(request)], [0, 2], positions=2)
        plain = capture(lm, [lm.encode(request)], [0, 2], positions=2)
        for column, layer in enumerate((0, 2)):
            values = found.values[layer][row]
            end = len(values) - found.answers[row]
            expected = (there - plain)[0, column]
            assert torch.allclose(values[end - 2 : end], expected, atol=2e-5)
            assert torch.allclose(found.last(layer)[row].float(), expected[-1], atol=2e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_prompt_to_vector(llama: LanguageModel, soft: bool) -> None:
    vectors = token_embeddings(llama, [20, 30]).float()
    lever = (
        PromptSteering("", slot="prefix", vectors=vectors) if soft else prompt("Say Z.", "prefix")
    )
    behavior = planted.behavior(8, readout=WORDS)
    done: Any = convert(llama, behavior, lever, "vector", train_requests=4, **SMALL)
    test = behavior.split(0).test
    held = displacements(llama, lever, [e.prompt for e in test.away][:3], [1])
    train = displacements(llama, lever, [e.prompt for e in behavior.split(0).train.away][:4], [1])
    v = torch.cat(train.values[1]).double().mean(0)
    values = torch.cat(held.values[1]).double()
    expected = 1 - float((values - v).square().sum() / values.square().sum())
    row = done.layers[1]
    assert row.explained == pytest.approx(expected, abs=1e-5)
    assert row.explained <= row.ceiling + 1e-9 < 1
    chosen = done.lever.layers[0]
    assert done.lever.alphas[chosen] > 0 and done.residual == 1 - done.layers[chosen].explained
    assert min(r.kl for r in done.layers) == done.layers[chosen].kl > 0
    assert done.unsteered_kl > 0
    assert done.placed.damage_p95 <= done.recovered.effect("before").damage_p95 * 10
    assert done.recovered.gap is not None and done.recovered.null_gap is not None
    assert done.to_dict()["lever"] == done.lever.label
    assert "explained" in str(done.table())


def test_the_last_positions_alone(llama: LanguageModel) -> None:
    """The mean, and what it is held against, are of the positions that the scope steers."""
    behavior = planted.behavior(8, readout=WORDS)
    found_in: list[Any] = [
        convert(
            llama, behavior, prompt("Say Z.", "prefix"), "vector", scope=scope, train_requests=4,
            **SMALL,
        )
        for scope in ("all", "last")
    ]  # fmt: skip
    whole, last = found_in
    assert str(last.lever.scope) == "last"
    for one, other in zip(whole.layers, last.layers, strict=True):
        assert other.last_own == pytest.approx(one.last_own)
    splits = behavior.split(0)
    v, held = (
        torch.cat(
            [
                d[len(d) - 1 - count :]
                for d, count in zip(found.values[2], found.answers, strict=True)
            ]
        ).double()
        for found in (
            displacements(llama, prompt("Say Z.", "prefix"), [e.prompt for e in part.away], [2])
            for part in (splits.train, splits.test)
        )
    )
    share = 1 - (held - v.mean(0)).square().sum() / held.square().sum()
    assert last.layers[2].explained == pytest.approx(float(share), abs=1e-5)
    with pytest.raises(TrimtabError, match="scope"):
        convert(llama, behavior, prompt("Say Z."), "vector", scope="prompt", **SMALL)


def test_a_prompt_that_is_off_changes_nothing(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="strength 0"):
        convert(llama, planted.behavior(), prompt("Say Z.").at(0.0), "vector", **SMALL)


@pytest.mark.parametrize("scope", ["all", "last", "post_instruction"])
def test_induced_states_are_those_of_the_steered_model(llama: LanguageModel, scope: str) -> None:
    """At the steered layer: the vector itself where the scope covers, nothing elsewhere."""
    vector = push(llama, scope)
    target = induced(llama, vector, REQUESTS, 1)
    moved = (target.steered - target.unsteered).cpu()
    step = vector.alphas[1] * vector.directions[1]
    start = head = 0
    for row in target.rows:
        head, answer = row.head, len(row.target) - 1
        covered = {
            "all": torch.ones(head + answer),
            "last": torch.tensor([0.0] * (head - 1) + [1.0] * (1 + answer)),
            "post_instruction": torch.tensor([1.0] * head + [0.0] * answer),
        }[scope]
        mine = moved[start : start + head + answer]
        assert torch.allclose(mine, covered[:, None] * step, atol=1e-4)
        start += head + answer
    assert start == len(moved) and head > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_vector_to_soft_closes_some_of_the_displacement(name: str) -> None:
    lm = tiny.language_model(name)
    behavior = planted.behavior(8, readout=WORDS)
    done: Any = convert(lm, behavior, push(lm), "soft", k=3, steps=25, train_requests=3, **SMALL)
    assert done.soft.loss < done.soft.start_loss
    assert done.matched.closed > done.null.closed
    assert done.matched.loss < done.null.loss
    assert done.residual == 1 - done.matched.closed
    assert done.lever.vectors is not None and done.lever.vectors.shape == (3, lm.d_model)
    assert done.recovered.n == 2 and "closed" in str(done.table())


def test_matching_refuses_layers_in_front_of_the_vector(llama: LanguageModel) -> None:
    behavior = planted.behavior()
    with pytest.raises(TrimtabError, match="steered layers from 2"):
        convert(llama, behavior, push(llama, layer=2), "soft", layer=1)
    with pytest.raises(TrimtabError, match="strength 0"):
        convert(llama, behavior, push(llama).at(0.0), "soft")


def test_a_match_at_its_ends(llama: LanguageModel) -> None:
    """States that are the wanted ones close everything; those of no steering close nothing."""
    vectors = token_embeddings(llama, [20]).float()
    target = induced(llama, push(llama), REQUESTS[:1], 1)
    (row,) = target.rows
    (whole,) = states(llama, [row], vectors, [Site("resid_post", 1)])
    mine = whole[-(row.head + len(row.target) - 1) :]
    all_of_it = match(llama, replace(target, steered=mine), vectors)
    assert all_of_it.closed == pytest.approx(1) and all_of_it.cosine == pytest.approx(1)
    assert all_of_it.shift == pytest.approx(1) and all_of_it.loss == pytest.approx(0, abs=1e-5)
    nothing = match(llama, replace(target, unsteered=mine), vectors)
    assert nothing.closed == pytest.approx(0)


def test_pull_back_is_the_derivative_of_the_projection(llama: LanguageModel) -> None:
    vector = push(llama)
    rows = lay_out(llama, REQUESTS, "prefix", targets=[[20], [21]])
    bound = Constraints(round_trip=False).bind(llama, rows)
    delta = pull_back(llama, rows, vector, 2, bound)
    middle = token_embeddings(llama)[bound.allowed].float().mean(0).expand(2, -1).clone()
    prompts = [row.first(0) for row in rows]

    def projected(vectors: torch.Tensor) -> float:
        with torch.no_grad():
            (h,) = states(llama, prompts, vectors, [Site("resid_post", 1)], last=True)
        return vector.alphas[1] * float((h.double() @ vector.directions[1].double()).mean())

    step = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(3)) * 1e-4
    seen = projected(middle + step) - projected(middle - step)
    assert seen == pytest.approx(2 * float((delta * step).sum()), rel=0.02)


def test_vector_to_prompt(llama: LanguageModel) -> None:
    behavior = planted.behavior(8, readout=WORDS)
    vector = planted.push(llama, scope="all", layers=(3,))
    few: dict[str, Any] = {"k": 2, "steps": 2, "top_k": 8, "train_requests": 2, **SMALL}
    done: Any = convert(llama, behavior, vector, "prompt", **few)
    assert (
        done.repaired.loss <= done.projected.loss + 1e-5 or done.projected.text != done.lever.text
    )
    assert done.projected.cosine > done.null.cosine
    assert done.projected.reconstruction > done.null.reconstruction
    assert done.residual == 1 - done.repaired.reconstruction
    assert done.lever.text and done.lever.text.isascii() and done.scored > 0
    assert done.recovered.null_gap is not None
    again = convert(llama, behavior, vector, "prompt", **few)
    assert again.lever.text == done.lever.text
    with pytest.raises(TrimtabError, match="strength 0"):
        convert(llama, behavior, vector.at(0.0), "prompt", k=2)
