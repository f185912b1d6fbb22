"""Projections as rank-1 updates: which steerings they equal, and which they do not."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import at_every_writer, bake, plan

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]
PRE_NORM = ("llama", "gpt2", "gpt_neox", "granite", "mixtral")


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def ablation(lm: LanguageModel, site: str, layers, seed: int = 1, m: float = 1.0, **how):
    each = {layer: direction(seed) for layer in layers}
    how = {"operation": "ablate", **how}
    return VectorSteering.from_directions(lm, each, m, site=site, **how)


def agree(lm: LanguageModel, vectors, tmp_path) -> float:
    """Bake, reload, and return the largest difference to the hook in next-token logits."""
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(lm))
        hooked = lm.next_logits(PROMPTS)
    assert (hooked - lm.next_logits(PROMPTS)).abs().max() > 0.01
    bake(lm, vectors, tmp_path / "baked", verify=False)
    return float((load(str(tmp_path / "baked")).next_logits(PROMPTS) - hooked).abs().max())


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("m", [1.0, 0.4, -1.0])
def test_single_writers_and_any_share(tmp_path, name, m):
    lm = tiny.language_model(name)
    vectors = [
        ablation(lm, "attn_out", (0, 2), m=m),
        ablation(lm, "mlp_out", (1,), seed=2, m=m),
        ablation(lm, "embed", (0,), seed=3, m=m),
    ]
    assert agree(lm, vectors, tmp_path) < 1e-5


@pytest.mark.parametrize("name", PRE_NORM)
def test_several_edits_of_one_writer_go_in_order(tmp_path, name):
    """The second projection sees what the first left, and what was added between them."""
    lm = tiny.language_model(name)
    vectors = [
        ablation(lm, "mlp_out", (1,), seed=1),
        ablation(lm, "mlp_out", (1,), seed=1, operation="add", m=0.9),
        ablation(lm, "mlp_out", (1,), seed=2, m=0.7, operation="affine", targets={1: 1.3}),
        ablation(lm, "embed", (0,), seed=2, operation="add", m=0.9),
        ablation(lm, "embed", (0,), seed=4, operation="affine", targets={0: -0.8}),
    ]
    assert agree(lm, vectors, tmp_path) < 1e-5


@pytest.mark.parametrize("name", PRE_NORM)
def test_projecting_the_whole_stream_is_projecting_every_writer(tmp_path, name):
    lm = tiny.language_model(name)
    everywhere = range(tiny.LAYERS)
    if name == "gpt_neox":
        vectors = [ablation(lm, "embed", (0,)), ablation(lm, "resid_post", everywhere)]
    else:
        vectors = [
            ablation(lm, "resid_pre", everywhere),
            ablation(lm, "resid_mid", everywhere),
            ablation(lm, "resid_post", (tiny.LAYERS - 1,)),
        ]
    assert agree(lm, vectors, tmp_path) < 1e-5
    found = plan(lm, vectors)
    assert found.extra_layers == 0 and "rank-1" in found.route


def test_a_prefix_of_the_stream_is_enough(tmp_path):
    lm = tiny.language_model("llama")
    vectors = [ablation(lm, "resid_pre", (0, 1)), ablation(lm, "resid_mid", (0,))]
    assert agree(lm, vectors, tmp_path) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda lm: [ablation(lm, "resid_post", range(tiny.LAYERS))],
        lambda lm: [ablation(lm, "resid_mid", (1,))],
        # Points are missing between, a share that is not whole, another direction, an addition.
        lambda lm: [ablation(lm, "resid_pre", range(tiny.LAYERS))],
        lambda lm: [ablation(lm, "resid_pre", (0,)), ablation(lm, "resid_mid", (0,), m=0.5)],
        lambda lm: [ablation(lm, "resid_pre", (0,)), ablation(lm, "resid_mid", (0,), seed=2)],
        lambda lm: [
            ablation(lm, "resid_pre", (0,)),
            ablation(lm, "resid_mid", (0,)),
            ablation(lm, "resid_post", (2,), operation="add"),
        ],
        lambda lm: [ablation(lm, "resid_post", (1,), operation="affine", targets={1: 0.5})],
    ],
)
def test_other_projections_of_the_stream_are_refused_and_would_be_wrong(tmp_path, make):
    lm = tiny.language_model("llama")
    vectors = make(lm)
    with pytest.raises(TrimtabError, match="no weight projects the stream") as caught:
        bake(lm, vectors, tmp_path / "out")
    assert "at_every_writer" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_behind_a_norm_projections_are_refused_by_name_but_not_of_the_embedding(tmp_path, name):
    lm = tiny.language_model(name)
    for site in ("attn_out", "mlp_out"):
        row = plan(lm, ablation(lm, site, (1,))).rows[0]
        assert row.route is None and "divisor" in row.reason
    assert agree(lm, [ablation(lm, "embed", (0,))], tmp_path) < 1e-5


def test_nothing_along_the_direction_is_left_in_the_weights(tmp_path):
    lm = tiny.language_model("llama")
    bake(lm, at_every_writer(ablation(lm, "resid_post", (2,))), tmp_path / "out")
    c = direction(1).double() / direction(1).double().norm()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (c @ tensor.double()).abs().max() < 1e-6
        if name.endswith("embed_tokens.weight"):
            assert (tensor.double() @ c).abs().max() < 1e-6


def test_every_writer_needs_one_direction():
    lm = tiny.language_model("llama")
    two = VectorSteering.from_directions(lm, {0: direction(0), 1: direction(1)})
    with pytest.raises(TrimtabError, match="one direction"):
        at_every_writer(two)
    parts = at_every_writer(two, 1)
    assert [p.site for p in parts] == ["embed", "attn_out", "mlp_out"]
    assert all(torch.equal(p.directions[0], two.directions[1]) for p in parts)
