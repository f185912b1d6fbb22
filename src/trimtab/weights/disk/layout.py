"""What an architecture's checkpoint looks like, and which of its tensors can hold a constant."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from trimtab.errors import TrimtabError

_QKVO = tuple(f"self_attn.{p}_proj.bias" for p in "qkvo")
_GATED = tuple(f"mlp.{p}_proj.bias" for p in ("gate", "up", "down"))


@dataclass(frozen=True)
class Layout:
    """Names and abilities of one architecture, for one configuration.

    Attributes:
        model_type: as in config.json.
        architecture: the class in transformers.
        block: what the names of block l's tensors begin with, `{}` for l.
        embedding: name of the token embedding; `positions` of learned position embeddings.
        head: name of the unembedding.
        depth_key: the configuration's name of the number of blocks.
        attention: what the names of the attention's tensors begin with, inside a block.
        mlp: the same for the MLP.
        attention_writer: weight of the attention's output projection.
        mlp_writer: pattern of the weights of the MLP's output projections.
        writes_rows: whether their rows are the stream's dimension (a Linear; not a Conv1D).
        mid_bias: bias that adds a constant after the attention, or None.
        post_bias: bias that adds a constant to the block's output, or None.
        switches: configuration flag -> the biases it brings to every block.
        null: how an added block emits a constant: `output_bias`, `value_bias`, `post_norm`, or
            None where it cannot.
        gain: with `post_norm`, the weight of the norm after the attention; `gain_offset` is 1
            where the norm multiplies by 1 + weight.
        norm_eps: epsilon of the norms.
        embed_scale: what the model multiplies token embeddings with.
        residual_multiplier: what it multiplies a sublayer's output with.
        post_norm: whether a norm stands between a sublayer and the stream.
        parallel: whether attention and MLP read the same stream.
        notes: what a reader of the result should know.
    """

    model_type: str
    architecture: str
    block: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    positions: str | None = None
    head: str = "lm_head.weight"
    depth_key: str = "num_hidden_layers"
    attention: str = "self_attn."
    mlp: str = "mlp."
    attention_writer: str = "self_attn.o_proj.weight"
    mlp_writer: str = r"mlp\.down_proj\.weight"
    writes_rows: bool = True
    mid_bias: str | None = None
    post_bias: str | None = None
    switches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    null: str | None = None
    gain: str = ""
    gain_offset: float = 0.0
    norm_eps: float = 1e-6
    embed_scale: float = 1.0
    residual_multiplier: float = 1.0
    post_norm: bool = False
    parallel: bool = False
    notes: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        return short(self.architecture)


def short(architecture: str) -> str:
    """Return a class name without what all of them end with."""
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


_O_BIAS = "self_attn.o_proj.bias"
_WINDOWS = (
    "layer_types lists every layer's attention; a runtime that derives the pattern from the layer's"
    " number instead (GGUF converters do) would give later layers the wrong window",
)
_POST = {
    "null": "post_norm",
    "gain": "post_attention_layernorm.weight",
    "switches": (("attention_bias", _QKVO),),
    "post_norm": True,
}
_BIASED = {
    "mid_bias": _O_BIAS,
    "post_bias": "mlp.down_proj.bias",
    "switches": (("attention_bias", _QKVO), ("mlp_bias", _GATED)),
    "null": "output_bias",
}
_KNOWN: dict[str, Layout] = {
    known.model_type: known
    for known in (
        Layout("llama", "LlamaForCausalLM", **_BIASED),
        Layout("granite", "GraniteForCausalLM", **_BIASED),
        Layout(
            "granitemoe",
            "GraniteMoeForCausalLM",
            mlp="block_sparse_moe.",
            mlp_writer=r"block_sparse_moe\.output_linear\.weight",
            mid_bias=_O_BIAS,
            switches=(("attention_bias", _QKVO),),
            null="output_bias",
        ),
        Layout(
            "qwen3",
            "Qwen3ForCausalLM",
            mid_bias=_O_BIAS,
            switches=(("attention_bias", _QKVO),),
            null="value_bias",
        ),
        Layout(
            "gemma",
            "GemmaForCausalLM",
            mid_bias=_O_BIAS,
            switches=(("attention_bias", _QKVO),),
            null="output_bias",
        ),
        Layout("qwen2", "Qwen2ForCausalLM", null="value_bias"),
        Layout("mistral", "MistralForCausalLM"),
        Layout("phi3", "Phi3ForCausalLM"),
        Layout(
            "mixtral",
            "MixtralForCausalLM",
            mlp="block_sparse_moe.",
            mlp_writer=r"block_sparse_moe\.experts\.\d+\.w2\.weight",
        ),
        Layout("gemma2", "Gemma2ForCausalLM", gain_offset=1.0, notes=_WINDOWS, **_POST),
        Layout("gemma3_text", "Gemma3ForCausalLM", gain_offset=1.0, notes=_WINDOWS, **_POST),
        Layout("olmo2", "Olmo2ForCausalLM", **_POST),
        Layout(
            "gpt2",
            "GPT2LMHeadModel",
            block="transformer.h.{}.",
            embedding="transformer.wte.weight",
            positions="transformer.wpe.weight",
            depth_key="n_layer",
            attention="attn.",
            attention_writer="attn.c_proj.weight",
            mlp_writer=r"mlp\.c_proj\.weight",
            writes_rows=False,
            mid_bias="attn.c_proj.bias",
            post_bias="mlp.c_proj.bias",
        ),
        Layout(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            block="gpt_neox.layers.{}.",
            embedding="gpt_neox.embed_in.weight",
            head="embed_out.weight",
            attention="attention.",
            attention_writer="attention.dense.weight",
            mlp_writer=r"mlp\.dense_4h_to_h\.weight",
            post_bias="mlp.dense_4h_to_h.bias",
        ),
    )
}


def layout_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Layout:
    """Return the layout of a causal language model; Gemma rounds its embedding scale to the dtype.

    Raises:
        TrimtabError: an architecture that is not known here, or a subclass of one.
    """
    model_type = str(config.model_type)
    found = _KNOWN.get(model_type)
    names = list(getattr(config, "architectures", None) or ())
    if found is None or (names and names != [found.architecture]):
        raise TrimtabError(
            asked=f"to bake into architecture {', '.join(names) or model_type}",
            found=f"routes only for {', '.join(k.architecture for k in _KNOWN.values())}",
            advice="steer with the hook: `with vector.on(lm):`",
        )
    eps = getattr(config, "rms_norm_eps", 1e-6)
    multiplier = float(getattr(config, "residual_multiplier", 1.0) or 1.0)
    changed: dict[str, object] = {"norm_eps": float(eps), "residual_multiplier": multiplier}
    scale = float(getattr(config, "embedding_multiplier", 1.0) or 1.0)
    if model_type.startswith("gemma"):
        # The models multiply by sqrt(d) rounded to the dtype of the weights.
        scale = float(torch.tensor(config.hidden_size**0.5, dtype=dtype))
    changed["embed_scale"] = scale
    if model_type == "gpt_neox":
        parallel = bool(config.use_parallel_residual)
        has_bias = bool(getattr(config, "attention_bias", True))
        changed["parallel"] = parallel
        changed["mid_bias"] = "attention.dense.bias" if has_bias and not parallel else None
    return replace(found, **changed)


def expected_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a checkpoint of this configuration holds.

    A tied unembedding is in it, which a checkpoint may leave out.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        for on_disk, shape in _on_disk(str(config.model_type), name, tuple(tensor.shape)):
            found[on_disk] = shape
    return found


def _on_disk(model_type: str, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:  # fmt: skip
    """Mixtures of experts, and one unembedding, are stored otherwise than they are held."""
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            stem, (n, double, d) = name.removesuffix("gate_up_proj"), shape
            return [(f"{stem}{e}.{w}.weight", (double // 2, d)) for e in range(n) for w in ("w1", "w3")]  # fmt: skip
        if name.endswith("experts.down_proj"):
            stem, (n, d, inner) = name.removesuffix("down_proj"), shape
            return [(f"{stem}{e}.w2.weight", (d, inner)) for e in range(n)]
    if model_type == "gpt_neox" and name == "lm_head.weight":
        name = "embed_out.weight"
    if model_type == "granitemoe":
        for inside, outside in _GRANITE_MOE.items():
            name = re.sub(inside, outside, name)
    return [(name, shape)]


_GRANITE_MOE = {
    r"experts\.gate_up_proj$": "input_linear.weight",
    r"experts\.down_proj$": "output_linear.weight",
    r"router\.weight$": "router.layer.weight",
}
