"""Heads taken apart: rows confirmed by numbers and gradients, norms in closed form, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.attention import AttentionCall, attending
from trimtab.models.heads import HeadLayer, HeadProjection, find_heads, heads_of
from trimtab.models.hooking import input_tensor
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import read_norm

TEXT = "The ferry leaves the harbor at noon."


def batch_of(lm: LanguageModel):
    return next(iter(lm.batches([lm.encode(TEXT)])))


def calls(lm: LanguageModel) -> list[AttentionCall]:
    seen: list[AttentionCall] = []
    with attending(lm, seen.append):
        lm.forward(batch_of(lm))
    return seen


def weight_of(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def by_row(module: nn.Module, gradient: Tensor) -> Tensor:
    """How much gradient each output of a projection has `[out]`."""
    squares = gradient.square()
    return squares.sum(1) if isinstance(module, nn.Linear) else squares.sum(0)


@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_rows_are_those_that_gradients_reach(lm: LanguageModel, role: str) -> None:
    layer = 1
    found = heads_of(lm)[layer]
    projection: HeadProjection = getattr(found, role)
    weight = weight_of(projection.module)
    was = weight.requires_grad
    weight.requires_grad_(True)
    try:
        state = getattr(calls(lm)[layer], role)
        assert state.shape[1] == projection.rows.shape[0]
        generator = torch.Generator().manual_seed(0)
        for head, rows in enumerate(projection.rows):
            aim = torch.randn(state[:, head].shape, generator=generator)
            total = (state[:, head] * aim).sum()
            (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
            mass = by_row(projection.module, gradient)
            share = float(mass[rows].sum() / mass.sum())
            # A norm over all heads' queries (OLMo 2) lets the others in through its size alone.
            together = "olmo2" in lm.name and role != "value"
            assert share > 0.8 if together else share == pytest.approx(1.0, abs=1e-6)
    finally:
        weight.requires_grad_(was)


def test_roles_do_not_share_rows(lm: LanguageModel) -> None:
    for layer in heads_of(lm):
        roles = (layer.query, layer.key, layer.value)
        used = [(id(role.module), int(row)) for role in roles for row in role.rows.flatten()]
        assert len(set(used)) == len(used)


@torch.no_grad()
def test_a_head_s_rows_and_columns_are_its_values_and_its_output(lm: LanguageModel) -> None:
    layer = 2
    found = heads_of(lm)[layer]
    entered: dict[str, Any] = {}
    handles = [
        lm.sites.attention[layer].register_forward_pre_hook(
            lambda m, args, kwargs: entered.update(x=input_tensor(args, kwargs)), with_kwargs=True
        ),
        lm.sites.attention[layer].register_forward_hook(
            lambda m, args, output: entered.update(left=output[0])
        ),
    ]
    try:
        call = calls(lm)[layer]
    finally:
        for handle in handles:
            handle.remove()
    mixed = call.mix(call.probabilities())
    total = torch.zeros_like(entered["left"])
    bias = getattr(found.output, "bias", None)
    for head in range(found.n_heads):
        kv = head // (found.n_heads // found.n_kv_heads)
        value = entered["x"] @ found.value.weights()[kv].T
        biases = found.value.biases()
        value = value if biases is None else value + biases[kv]
        torch.testing.assert_close(value, call.value[:, kv], rtol=1e-4, atol=1e-5)
        mine = call.probabilities()[:, head] @ value
        torch.testing.assert_close(mine, mixed[:, :, head], rtol=1e-4, atol=1e-5)
        total += mine @ found.out_weights()[head].T
    total = total if bias is None else total + bias
    torch.testing.assert_close(total, entered["left"], rtol=1e-4, atol=1e-4)


def test_where_norms_stand(lm: LanguageModel) -> None:
    layer = heads_of(lm)[1]
    names = {
        name: None if part is None else path(lm, part)
        for name, part in (
            ("norm", layer.norm),
            ("mlp_norm", layer.mlp_norm),
            ("attention_post", layer.attention_post),
        )
    }
    usual = ("input_layernorm", "post_attention_layernorm", None)
    gemma = (
        "input_layernorm",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
    )
    expected = {
        "tiny-gemma2": gemma,
        "tiny-gemma3": gemma,
        "tiny-olmo2": (None, None, "post_attention_layernorm"),
        "tiny-gpt2": ("ln_1", "ln_2", None),
    }.get(lm.name, usual)
    assert tuple(names.values()) == expected


def path(lm: LanguageModel, module: nn.Module) -> str:
    return next(name for name, m in lm.sites.blocks[1].named_modules() if m is module)


@torch.no_grad()
def test_norms_in_closed_form(lm: LanguageModel) -> None:
    layer = heads_of(lm)[1]
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(3, 5, lm.d_model, generator=generator)
    stream = parts.sum(0)
    for norm in (layer.norm, layer.mlp_norm, layer.attention_post, lm.sites.final_norm):
        if norm is None:
            continue
        form = read_norm(norm, lm.d_model, "a norm")
        assert form.centered == isinstance(norm, nn.LayerNorm)
        shift = form.shift.float()
        shares = sum((form.direct(part, stream) for part in parts), start=shift)
        torch.testing.assert_close(shares, norm(stream), rtol=1e-4, atol=1e-5)
        # The rest of the derivative goes along the norm's own output, through its size.
        step = 1e-3 * parts[0]
        moved = (norm(stream + step) - norm(stream - step)) / 2
        inner, centered = form.center(stream), form.center(step)
        sizes = inner.square().mean(-1, keepdim=True) + form.eps
        along = (inner * centered).mean(-1, keepdim=True) / sizes
        wanted = form.direct(step, stream) - along * (norm(stream) - shift)
        torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=2e-6)


def test_other_functions_are_no_norm() -> None:
    with pytest.raises(TrimtabError, match="neither RMS nor LayerNorm"):
        read_norm(nn.Tanh(), 16, "a hyperbolic tangent")


def test_heads_are_remembered_and_the_model_left_alone(llama: LanguageModel) -> None:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())
    assert heads_of(llama) is heads_of(llama)
    again = find_heads(llama)
    assert len(again) == llama.n_layers and isinstance(again[0], HeadLayer)
    now = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())
    assert now == hooks


class Odd(nn.Module):
    """A projection that is no plain linear map."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Louder(nn.Linear):
    """A linear module whose output is not its weight's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda a: setattr(a, "v_proj", Odd(a.v_proj)), "a projection of the kind Odd"),
        (lambda a: setattr(a, "o_proj", like(Louder, a.o_proj)), "do not add up"),
        (lambda a: rename(a), "no projections among"),
    ],
)
def test_an_unknown_attention_is_refused_by_name(change, found: str) -> None:
    lm = tiny.language_model("llama")
    change(lm.model.get_submodule("model.layers.2.self_attn"))
    with pytest.raises(TrimtabError, match=found) as caught:
        find_heads(lm)
    assert "layer 2 of tiny-llama (LlamaAttention)" in str(caught.value)


def like(kind: type[nn.Linear], module: nn.Linear) -> nn.Linear:
    made = kind(module.in_features, module.out_features, bias=False)
    made.weight = module.weight
    return made


def rename(attention: nn.Module) -> None:
    """Values under a name that nobody proposes; the forward still finds them."""
    inner = attention.get_submodule("v_proj")
    attention.add_module("latent", inner)
    del attention._modules["v_proj"]
    object.__setattr__(attention, "v_proj", inner)
