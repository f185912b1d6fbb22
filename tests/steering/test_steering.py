"""Steering values: what they refuse, what they add, how they compose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.steering.prompt import prompt
from trimtab.steering.scope import Scope
from trimtab.steering.vector import Steering, VectorSteering

PROMPTS = ["The ferry leaves at noon.", "Please talk only about cats on the pier."]


@pytest.fixture(scope="module")
def lm():
    return tiny.language_model("llama")


def direction(seed: int = 0, width: int = tiny.WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def stream(lm, layer: int) -> torch.Tensor:
    """The output of block `layer` for one prompt, `[seq, d_model]`."""
    seen = []
    block = lm.sites.blocks[layer]
    handle = block.register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    try:
        with torch.no_grad():
            lm.forward(next(lm.batches([lm.encode(PROMPTS[0])])))
    finally:
        handle.remove()
    return seen[0][0]


def built(**changes) -> VectorSteering:
    unit = torch.nn.functional.normalize(direction(), dim=0)
    values = {
        "directions": {1: unit, 3: unit},
        "layers": (1,),
        "scales": {1: 0.5, 3: 2.0},
        "n_layers": tiny.LAYERS,
        "d_model": tiny.WIDTH,
    }
    return VectorSteering(**(values | changes))


@pytest.mark.parametrize("alpha", [1.0, -3.5])
@pytest.mark.parametrize(
    "form", [list, np.asarray, torch.as_tensor, lambda c: torch.tensor(c).half()]
)
def test_from_directions_adds_exactly_alpha_c(lm, alpha, form):
    c = direction()
    given = form(c.tolist())
    vector = VectorSteering.from_directions(lm, {2: given}, alpha=alpha)
    before = stream(lm, 2)
    with vector.on(lm):
        after = stream(lm, 2)
    moved = alpha * torch.as_tensor(np.asarray(given)).float()
    # float32 rounds h + alpha c by half a unit in the last place of a number of that size
    tolerance = 1e-6 * (1.0 + float(after.abs().max()))
    assert torch.allclose(after - before, moved.expand_as(before), atol=tolerance)
    assert vector.alphas == {
        2: pytest.approx(abs(alpha) * float(c.norm()) * np.sign(alpha), rel=1e-3)
    }
    assert vector.strength == 1.0 and str(vector.scope) == "all"


def test_at_scales_the_push(lm):
    vector = VectorSteering.from_directions(lm, {1: direction()}, alpha=2.0)
    before = stream(lm, 1)
    for m in (-1.5, 0.25, 3.0):
        with vector.at(m).on(lm):
            moved = (stream(lm, 1) - before)[0]
        assert torch.allclose(moved, 2.0 * m * direction(), atol=1e-5)
    assert vector.strength == 1.0  # a value: at() made others


def test_ablate_and_affine_move_the_projection(lm):
    c = torch.nn.functional.normalize(direction(), dim=0)
    before = stream(lm, 2) @ c
    for operation, share, target, expected in (
        ("ablate", 1.0, 0.0, torch.zeros_like(before)),
        ("ablate", 0.5, 0.0, 0.5 * before),
        ("affine", 1.0, 4.0, torch.full_like(before, 4.0)),
        ("affine", 0.25, 4.0, 0.75 * before + 1.0),
    ):
        vector = VectorSteering.from_directions(
            lm, {2: direction()}, alpha=share, operation=operation, targets={2: target}
        )
        with vector.on(lm):
            assert torch.allclose(stream(lm, 2) @ c, expected, atol=1e-5)


def test_strength_zero_installs_nothing_and_is_the_identity(lm):
    vector = VectorSteering.from_directions(lm, {1: direction()}, alpha=5.0)
    before = lm.next_logits(PROMPTS)
    with vector.at(0.0).on(lm):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
        assert torch.equal(lm.next_logits(PROMPTS), before)
    assert vector.at(0.0).edits() == []
    with vector.on(lm):
        assert not torch.equal(lm.next_logits(PROMPTS), before)
    assert torch.equal(lm.next_logits(PROMPTS), before)


def test_row_strengths_are_the_rows_own(lm):
    vector = VectorSteering.from_directions(lm, {1: direction(), 2: direction(1)}, alpha=0.7)
    strengths = [-1.25, 2.0]
    with vector.at(99.0).on(lm, row_strengths=strengths):
        together = lm.next_logits(PROMPTS)
    for row, m in enumerate(strengths):
        with vector.at(m).on(lm):
            alone = lm.next_logits(PROMPTS)
        assert torch.allclose(together[row], alone[row], atol=1e-5)
        assert not torch.allclose(together[row], alone[1 - row], atol=1e-2)


def test_select_changes_what_is_named_and_nothing_else(lm):
    vector = VectorSteering.from_directions(
        lm, {layer: direction(layer) for layer in range(4)}, alpha=2.0
    )
    chosen = vector.select(layers=[2, 0], scope="last", strength=-1.0)
    assert chosen.layers == (0, 2) and chosen.scope == Scope.parse("last")
    assert list(chosen.directions) == [0, 1, 2, 3] and chosen.scales == vector.scales
    assert [edit.site.layer for edit in chosen.edits()] == [0, 2]
    assert chosen.alphas == {layer: -vector.scales[layer] for layer in (0, 2)}
    assert chosen.select(layers=[3]).layers == (3,)  # what was inactive is not lost
    assert chosen.select(site="mlp_out").edits()[0].site.kind == "mlp_out"
    assert chosen.select(operation="ablate").edits()[0].amount == -1.0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"directions": {1: torch.ones(tiny.WIDTH)}}, "length 5.65"),
        ({"directions": {1: torch.ones(5) / math.sqrt(5)}}, r"shape \[5\]"),
        ({"directions": {1: torch.full((tiny.WIDTH,), float("nan"))}}, "not finite"),
        ({"directions": {4: direction()}}, "layers 0 to 3"),
        ({"directions": {-1: direction()}}, "layers 0 to 3"),
        ({"directions": {1.5: direction()}}, "layers 0 to 3"),
        ({"layers": ()}, "at least one layer"),
        ({"layers": (2,)}, "only layers that have a direction"),
        ({"layers": (True,)}, "layers 0 to 3"),
        ({"scales": {3: 1.0}}, "no scale"),
        ({"scales": {1: float("inf")}}, "not a finite number"),
        ({"norms": {1: float("nan")}}, "not a finite number"),
        ({"strength": float("nan")}, "not a finite number"),
        ({"strength": "strong"}, "not a finite number"),
        ({"operation": "multiply"}, "add, ablate, affine"),
        ({"site": "residual"}, "resid_post"),
        ({"scope": "everywhere"}, "no such scope"),
        ({"provenance": {"x": float("nan")}}, "JSON"),
        ({"provenance": {"x": torch.ones(1)}}, "JSON"),
    ],
)
def test_the_constructor_refuses(change, found):
    with pytest.raises(TrimtabError, match=found):
        built(**change)
    assert built().layers == (1,)


def test_directions_within_rounding_of_a_unit_are_taken():
    unit = torch.nn.functional.normalize(direction(), dim=0)
    assert built(directions={1: unit.half(), 3: unit}).directions[1].dtype == torch.float32
    with pytest.raises(TrimtabError, match="length"):
        built(directions={1: unit * 1.001, 3: unit})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([0.0] * tiny.WIDTH, "zeros"),
        ([1.0] * 5, r"shape \[5\]"),
        ([float("inf")] * tiny.WIDTH, "not finite"),
        ("left", "no vector of numbers"),
        ([["a"]], "no vector of numbers"),
    ],
)
def test_from_directions_refuses(lm, given, found):
    with pytest.raises(TrimtabError, match=found):
        VectorSteering.from_directions(lm, {1: given})
    with pytest.raises(TrimtabError, match="at least one layer"):
        VectorSteering.from_directions(lm, {})


def test_what_it_was_built_from_can_change_later(lm):
    c = direction()
    record = {"data": [1, 2]}
    vector = VectorSteering.from_directions(lm, {1: c})
    kept = vector.directions[1].clone()
    c.zero_()
    assert torch.equal(vector.directions[1], kept)
    with_record = built(provenance=record)
    record["data"].append(3)
    assert with_record.provenance == {"data": [1, 2]}


def test_labels_say_what_and_how_hard():
    vector = built(provenance={"behavior": "mood", "method": "pca"}, strength=-1.5)
    assert vector.label == "mood pca m=-1.5"
    assert "Refuse" in prompt("Refuse politely.").label
    assert len(prompt("word " * 100).label) < 60


def test_levers_follow_the_protocol():
    assert isinstance(built(), Steering) and isinstance(prompt("x"), Steering)


def test_an_empty_prompt_is_refused():
    with pytest.raises(TrimtabError, match="non-empty"):
        prompt("  ")
