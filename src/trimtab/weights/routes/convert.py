"""Conversion: the same computation under another architecture's name, one whose tensors can steer.

Qwen2 -> Llama: attention_bias with a zero bias of o_proj. Mistral -> Llama without a sliding
window, else -> Qwen2 with every layer's attention sliding and zero q, k, v biases. Phi-3 -> Llama
(or Qwen2): the rows of the fused qkv_proj and gate_up_proj are q, k, v and gate, up. Mixtral ->
GraniteMoe with all of Granite's multipliers at 1 and its attention multiplier at head_dim^-1/2:
softmax over all experts, renormalized over the chosen ones, is the softmax over the chosen ones'
logits, which is what GraniteMoe computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.disk.sources import Copy, TensorSource, Zeros, stacked


@dataclass(frozen=True)
class StreamConversion:
    """A way to write a model as the architecture `target`, or why its configuration forbids it."""

    target: str
    refusal: Callable[[Any], str | None]
    apply: Callable[[Draft], None]


def conversions_of(model_type: str) -> tuple[StreamConversion, ...]:
    """Return the conversions known for an architecture, simplest first."""
    return _KNOWN.get(model_type, ())


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)
_DROPPED = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "original_max_position_embeddings",
    "resid_pdrop",
    "embd_pdrop",
    "partial_rotary_factor",
    "router_jitter_noise",
    "rope_scaling",
)


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rewrite(draft: Draft, model_type: str, architecture: str, **more: object) -> None:
    """Write every default out: another class may have others."""
    config = draft.base.config
    raw = draft.raw
    for name in _DROPPED:
        raw.pop(name, None)
    raw |= {name: getattr(config, name) for name in _SHARED}
    rope = dict(config.rope_parameters)
    rope.pop("partial_rotary_factor", None)
    raw["rope_parameters"] = rope
    # Runtimes with older configuration classes look for it here.
    raw["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    raw |= {"model_type": model_type, "architectures": [architecture]}
    raw |= {"head_dim": _head_dim(config), **more}
    for block in draft.blocks:
        block.kind = None
    before = draft.layout.short
    draft.layout = layout_of(draft.config, draft.dtype)
    draft.steps.append(f"convert {before} to {draft.layout.short}, the same computation")


def _to_llama(draft: Draft) -> None:
    biased = draft.layout.model_type == "qwen2"
    _split_fused(draft)
    more = {"attention_bias": biased, "mlp_bias": False, "pretraining_tp": 1}
    _rewrite(draft, "llama", "LlamaForCausalLM", **more)
    if biased:
        draft.ensure_bias("self_attn.o_proj.bias")


def _to_qwen2(draft: Draft) -> None:
    config = draft.base.config
    _split_fused(draft)
    for block in draft.blocks:
        for p in "qkv":
            weight = block.tensors[f"self_attn.{p}_proj.weight"]
            block.tensors[f"self_attn.{p}_proj.bias"] = Zeros(weight.dtype, (weight.shape[0],))
    window = {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * len(draft.blocks),
    }
    _rewrite(draft, "qwen2", "Qwen2ForCausalLM", **window)
    for block in draft.blocks:
        block.kind = "sliding_attention"


def _to_granite_moe(draft: Draft) -> None:
    config = draft.base.config
    experts = range(int(config.num_local_experts))
    inner, d = int(config.intermediate_size), int(config.hidden_size)
    for block in draft.blocks:
        own = {n: t for n, t in block.tensors.items() if not n.startswith("block_sparse_moe.")}
        moe = "block_sparse_moe."
        pairs = [block.tensors[f"{moe}experts.{e}.{w}.weight"] for e in experts for w in ("w1", "w3")]  # fmt: skip
        down = [block.tensors[f"{moe}experts.{e}.w2.weight"] for e in experts]
        shape = (len(experts), 2 * inner, d)
        block.tensors = {
            **own,
            f"{moe}router.layer.weight": block.tensors[f"{moe}gate.weight"],
            f"{moe}input_linear.weight": stacked([_copy(t) for t in pairs], shape),
            f"{moe}output_linear.weight": stacked(
                [_copy(t) for t in down], (len(experts), d, inner)
            ),  # fmt: skip
        }
    _rewrite(
        draft,
        "granitemoe",
        "GraniteMoeForCausalLM",
        attention_bias=False,
        attention_multiplier=_head_dim(config) ** -0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        num_local_experts=len(experts),
        num_experts_per_tok=config.num_experts_per_tok,
    )


def _split_fused(draft: Draft) -> None:
    if draft.layout.model_type != "phi3":
        return
    config = draft.base.config
    q = config.num_attention_heads * _head_dim(config)
    kv, inner = config.num_key_value_heads * _head_dim(config), config.intermediate_size
    for block in draft.blocks:
        qkv = _copy(block.tensors.pop("self_attn.qkv_proj.weight"))
        both = _copy(block.tensors.pop("mlp.gate_up_proj.weight"))
        block.tensors |= {
            "self_attn.q_proj.weight": qkv.rows(0, q),
            "self_attn.k_proj.weight": qkv.rows(q, q + kv),
            "self_attn.v_proj.weight": qkv.rows(q + kv, q + 2 * kv),
            "mlp.gate_proj.weight": both.rows(0, inner),
            "mlp.up_proj.weight": both.rows(inner, 2 * inner),
        }


def _copy(source: TensorSource) -> Copy:
    assert isinstance(source, Copy)  # a conversion comes before every change
    return source


def _no_window(config: Any) -> str | None:
    """Llama has no sliding window."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds or (window is not None and not kinds):
        return f"a sliding window of {window} tokens, which Llama does not have"
    return _whole_heads(config)


def _window(config: Any) -> str | None:
    return None if getattr(config, "sliding_window", None) else "no sliding window"


def _whole_heads(config: Any) -> str | None:
    if config.hidden_size % config.num_attention_heads:
        return f"a width that {config.num_attention_heads} heads do not divide"
    return None


def _plain_rope(config: Any) -> str | None:
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return f"rotary embeddings of the type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotary embeddings on a part of {rope['partial_rotary_factor']} of each head"
    return None


def _unmixed(config: Any) -> str | None:
    if getattr(config, "sliding_window", None) is not None:
        return f"a sliding window of {config.sliding_window} tokens, which GraniteMoe does not have"
    return None


_KNOWN: dict[str, tuple[StreamConversion, ...]] = {
    "qwen2": (StreamConversion("Llama", _no_window, _to_llama),),
    "mistral": (
        StreamConversion("Llama", _no_window, _to_llama),
        StreamConversion("Qwen2", _window, _to_qwen2),
    ),
    "phi3": (
        StreamConversion("Llama", lambda c: _plain_rope(c) or _no_window(c), _to_llama),
        StreamConversion("Qwen2", lambda c: _plain_rope(c) or _window(c), _to_qwen2),
    ),
    "mixtral": (StreamConversion("GraniteMoe", _unmixed, _to_granite_moe),),
}
