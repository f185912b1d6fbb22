"""The bias route: in a pre-norm Llama block a bias of `down_proj` is a constant of `resid_post`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering

SUPPORTED = "architecture LlamaForCausalLM, scope all, operation add, site resid_post"


def check_supported(lm: LanguageModel, vector: VectorSteering) -> None:
    """Refuse, by name, every combination for which a bias is not exactly the steering.

    Other architectures have no such bias and drop it on reload, or normalise or scale it before it
    is added; a constant in the weights acts on every token and cannot look at the activations.

    Raises:
        TrimtabError: names the architecture, scope, operation and site asked for.
    """
    architecture = type(lm.model).__name__
    asked = (
        f"to bake into architecture {architecture}, scope {vector.scope}, "
        f"operation {vector.operation}, site {vector.site}"
    )
    exact = (
        type(lm.model) is LlamaForCausalLM
        and str(vector.scope) == "all"
        and vector.operation == "add"
        and vector.site == "resid_post"
    )
    if not exact:
        raise TrimtabError(
            asked=asked,
            found=f"an exact route only for {SUPPORTED}",
            advice="steer with the hook instead: `with vector.on(lm):`",
        )
    if getattr(lm.model.config, "quantization_config", None) is not None:
        raise TrimtabError(
            asked=asked,
            found="quantised weights",
            advice="bake into the unquantised model and quantise the result",
        )
    if any(tensor.is_meta for tensor in lm.model.state_dict().values()):
        raise TrimtabError(
            asked=asked,
            found="weights that are not in memory (offloaded)",
            advice="load the model without offloading",
        )


def with_bias(lm: LanguageModel, vector: VectorSteering) -> LlamaForCausalLM:
    """Return a model that shares the weights of `lm` and has alpha_l c_l in its biases.

    `lm` stays as it is: only the biases are new tensors. A bias already there is added to, in
    float64, and rounded once to the dtype of the weights. The result is for saving; it cannot run,
    as buffers that are not saved (rotary frequencies) stay on the meta device.
    """
    source = lm.model
    config = copy.deepcopy(source.config)
    assert isinstance(config, LlamaConfig)  # check_supported let only Llama pass
    config.mlp_bias = True
    with torch.device("meta"):
        baked = LlamaForCausalLM(config)
    state = dict(source.state_dict())
    alphas = vector.alphas
    for layer in range(lm.n_layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = state[f"model.layers.{layer}.mlp.{name}.weight"]
            key = f"model.layers.{layer}.mlp.{name}.bias"
            state.setdefault(key, weight.new_zeros(weight.shape[0]))
            if name == "down_proj" and layer in alphas:
                state[key] = _shifted(state[key], alphas[layer], vector.directions[layer])
    result = baked.load_state_dict(state, strict=False, assign=True)
    strange = [*result.missing_keys, *result.unexpected_keys]
    if strange:
        raise TrimtabError(
            asked="to bake into a LlamaForCausalLM",
            found=f"tensors that are not Llama's: {strange[:4]}",
            advice="merge or remove adapters and other additions first",
        )
    baked.tie_weights()
    baked.generation_config = copy.deepcopy(source.generation_config)
    return baked


def rounding(vector: VectorSteering, dtype: torch.dtype) -> float:
    """Return the largest error of alpha c stored in `dtype`, over the largest entry of alpha c."""
    worst = 0.0
    for layer, alpha in vector.alphas.items():
        exact = alpha * vector.directions[layer].double()
        error = (exact.to(dtype).double() - exact).abs().max()
        worst = max(worst, float(error / exact.abs().max().clamp_min(1e-300)))
    return worst


def _shifted(bias: Tensor, alpha: float, direction: Tensor) -> Tensor:
    moved = bias.detach().double() + alpha * direction.to(bias.device, torch.float64)
    return moved.to(bias.dtype)
