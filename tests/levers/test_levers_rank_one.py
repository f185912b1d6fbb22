"""Vector to rank-1 update: the formula, the units, the scope, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from planted import behavior, merged
from trimtab.errors import TrimtabError
from trimtab.levers.conversions.conversion import Setting
from trimtab.levers.conversions.convert import convert
from trimtab.levers.conversions.rank_one import fit_rank_one, writers_of
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import writer_of

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]
SMALL: dict[str, Any] = {"max_new_tokens": 4, "max_prompts": 3}
REFUSED = ("gemma2", "gemma3", "olmo2", "mixtral")


def push(lm: LanguageModel, scope: str = "all", site: str = "resid_post") -> VectorSteering:
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(lm.d_model, generator=generator)
    return VectorSteering.from_directions(lm, {1: c}, 0.7, scope=scope, site=site)


def setting(lm: LanguageModel) -> Setting:
    return Setting(lm, behavior(), **SMALL)


def inputs(lm: LanguageModel, encoded) -> torch.Tensor:
    """The inputs of layer 1's MLP writer at every token, read plainly, float64."""
    seen: list[torch.Tensor] = []
    handle = writer_of(lm, ("mlp", 1)).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for item in encoded:
        (batch,) = lm.batches([item])
        with torch.no_grad():
            lm.forward(batch)
    handle.remove()
    return torch.cat([x[0] for x in seen]).double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite", "phi3"])
def test_unexplained_share_is_the_formula(name: str) -> None:
    lm = tiny.language_model(name)
    update, (fit,) = fit_rank_one(setting(lm), push(lm), ridge=0.0)
    x = inputs(lm, setting(lm).answered(setting(lm).train(48)))
    square, first = x.T @ x / len(x), x.mean(0)
    expected = 1 - float(first @ torch.linalg.solve(square, first))
    assert fit.tokens == len(x)
    assert fit.unexplained == pytest.approx(expected, abs=1e-6)
    assert 0 < fit.unexplained < 1 and fit.held_out > fit.unexplained
    assert fit.null > fit.held_out


def test_at_its_own_tokens_it_is_the_vector_up_to_the_residual() -> None:
    """The added output, in the units of the stream, is alpha c times u . x; Granite scales it."""
    lm = tiny.language_model("granite")
    vector = push(lm).at(1.5)
    update, _ = fit_rank_one(setting(lm), vector, ridge=0.0)
    x = inputs(lm, [lm.encode(PROMPTS[0])])
    u = update.right["mlp", 1][0].double()
    b = update.left["mlp", 1][:, 0].double() * update.strength * lm.sites.residual_multiplier
    meant = vector.directions[1].double() * vector.alphas[1]
    assert torch.allclose(b, meant, atol=1e-6)
    assert float((x @ u).mean()) == pytest.approx(1, abs=0.5)
    assert update.strength == vector.strength


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_exact_where_an_input_is_constant(ridge: float) -> None:
    lm = tiny.language_model("gpt2")
    with torch.no_grad():  # an MLP whose last inner unit is the same for every token
        fc = lm.model.get_submodule("transformer.h.1.mlp.c_fc")
        fc.get_parameter("weight")[:, -1] = 0
        fc.get_parameter("bias")[-1] = 8.0
    vector = push(lm)
    chosen = behavior(10, readout={"toward": ["Z"], "away": ["Q"]})
    # More tokens than the writer has inputs, or the best u on them is not the only one.
    done: Any = convert(lm, chosen, vector, "rank-1", ridge=ridge, max_new_tokens=24, max_prompts=3)
    assert done.residual < (1e-6 if not ridge else 1e-3)
    with vector.on(lm):
        steered = lm.next_logits(PROMPTS)
    assert (steered - lm.next_logits(PROMPTS)).abs().max() > 0.05
    allowed = 1e-3 if not ridge else 0.2
    assert torch.allclose(merged(lm, done.lever).next_logits(PROMPTS), steered, atol=allowed)
    assert done.recovered.gap is not None
    assert done.recovered.gap[0] == pytest.approx(1, abs=0.1)


def test_a_scope_is_a_target_of_its_own(llama: LanguageModel) -> None:
    """Only the tokens that the scope covers count in E t^2; random targets leave everything."""
    _, (whole,) = fit_rank_one(setting(llama), push(llama))
    _, (last,) = fit_rank_one(setting(llama), push(llama, "last"))
    assert whole.unexplained < last.unexplained < 1


def test_attention_writer_of_a_mixture() -> None:
    lm = tiny.language_model("mixtral")
    vector = push(lm, site="attn_out")
    assert writers_of(lm, vector) == {1: ("attention", 1)}
    done = convert(lm, behavior(), vector, "rank-1", **SMALL)
    assert "attention of layer 1" in str(done.table())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    lm = tiny.language_model(name)
    with pytest.raises(TrimtabError) as caught:
        fit_rank_one(setting(lm), push(lm))
    assert type(lm.model).__name__ in str(caught.value)


def test_other_sites_and_operations_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no output projection"):
        fit_rank_one(setting(llama), push(llama, site="resid_pre"))
    with pytest.raises(TrimtabError, match="ablate"):
        fit_rank_one(setting(llama), push(llama).select(operation="ablate"))
