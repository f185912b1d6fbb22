"""How a constant of the stream becomes weights: a bias, or a block that writes it.

Bias: in a pre-norm block, resid_post = resid_mid + r (W x + b): adding alpha c / r to the bias b of
the MLP's output projection adds alpha c to the block's output, and the same bias of the attention
adds it to resid_mid. r is 1, or Granite's residual multiplier. After a post-norm it would not be
alpha c.

Null block: one more decoder block that reads nothing and writes a constant.
Its projections are zero, so its MLP adds nothing and its attention adds only what biases make:

output bias (Llama, Granite, Gemma): o_proj.bias = t / r.
value bias (Qwen2, which has no output bias, and Qwen3, whose output bias not every runtime reads):
    v_proj.bias[0] = 1 and o_proj.weight[:, 0] = t / r. Attention weights sum to 1,
    so the first coordinate of the first head is 1 at every token, whatever the window.
post-norm (Gemma 2 and 3, OLMo 2): the norm after the attention makes g b / sqrt(mean(b^2) + eps) of
    a constant b = o_proj.bias with gain g. OLMo 2: b = 1 and g = t sqrt(1 + eps). Gemma stores
    g - 1, whose rounding near -1 would spoil small entries; so there one g >= 1.25 rms(t) serves
    all, and b is t scaled to mean square q = eps u^2 / (1 - u^2), u = rms(t) / g, for which
    g b / sqrt(q + eps) = t.

In the same way a block is split for a constant in its middle: the first half keeps the attention,
the second keeps the MLP and its attention emits the constant. That holds for every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.weights.disk.checkpoint import DTYPES
from trimtab.weights.disk.draft import Block, Draft
from trimtab.weights.disk.layout import Layout
from trimtab.weights.disk.sources import TensorSource, Zeros
from trimtab.weights.routes.changes import Point

_OUTPUT_BIAS = "o_proj.bias"


def bias_of(layout: Layout, point: Point) -> str | None:
    """Return the bias that adds a constant at a point, or None where there is none."""
    return {"mid": layout.mid_bias, "post": layout.post_bias}.get(point[0])


def add_bias(draft: Draft, point: Point, constant: Tensor) -> None:
    """Add a constant of the stream, float64 `[d_model]`, to a bias.

    A bias already there is added to, in float64, and rounded once to the dtype of the weights.
    """
    kind, layer = point
    name = bias_of(draft.layout, point)
    assert name is not None  # the planner chose this route because there is one
    draft.ensure_bias(name)
    block = draft.block_of(layer, "attention" if kind == "mid" else "mlp")
    multiplier = draft.layout.residual_multiplier
    draft.shift_bias(block, name, constant / multiplier, f"{name} of block {layer}")
    draft.steps.append(f"add the constant to {name} of block {layer}")


def add_null_block(draft: Draft, point: Point, constant: Tensor) -> None:
    """Put in a block that adds a constant of the stream, float64 `[d_model]`, at a point."""
    kind, layer = point
    draft.ensure_bias(draft.layout.attention + _OUTPUT_BIAS)
    if kind == "mid":
        whole = draft.block_of(layer, "attention")
        at = draft.blocks.index(whole)
        # Two blocks of the halves that are left, so that a second constant can follow.
        first = Block(layer, "attention", _silenced(whole.tensors, draft.layout.mlp), whole.kind)
        second = Block(layer, "mlp", dict(whole.tensors), whole.kind)
        emitting = second
        draft.blocks[at : at + 1] = [first, second]
        draft.steps.append(f"split block {layer} and emit the constant between its halves")
    else:
        at = max(n for n, block in enumerate(draft.blocks) if block.origin == layer)
        neighbor = draft.blocks[at]
        quiet = _silenced(neighbor.tensors, draft.layout.mlp)
        emitting = Block(layer, "nothing", quiet, neighbor.kind)
        draft.blocks.insert(at + 1, emitting)
        draft.steps.append(f"insert a block after block {layer} that emits the constant")
    _emit(draft, emitting, constant, f"the constant after {kind} of block {layer}")


def _silenced(tensors: dict[str, TensorSource], prefix: str) -> dict[str, TensorSource]:
    """Zeros for all that one sublayer has; its norms keep what they are, they see zeros."""
    return {
        name: Zeros(source.dtype, source.shape) if name.startswith(prefix) else source
        for name, source in tensors.items()
    }


def _emit(draft: Draft, block: Block, constant: Tensor, what: str) -> None:
    """Let the attention of a block write a constant and nothing else."""
    layout = draft.layout
    block.tensors = _silenced(block.tensors, layout.attention)
    if layout.null == "post_norm":
        bias = layout.attention + _OUTPUT_BIAS
        dtype = DTYPES[block.tensors[bias].dtype]
        b, gain = post_norm_constant(constant, layout.gain_offset, layout.norm_eps, dtype)
        block.tensors[bias] = draft.value(b, block.tensors[bias], what)
        old = block.tensors[layout.gain]
        # In no file of the base: it is another tensor.
        block.tensors[layout.gain] = draft.value(gain, Zeros(old.dtype, old.shape), what)
        made = (gain.to(dtype).double() + layout.gain_offset) * b.to(dtype).double()
        made = made / (b.to(dtype).double().square().mean() + layout.norm_eps).sqrt()
        # What comes out is what counts; the two roundings may add up or cancel.
        draft.rounding.pop(what, None)
        draft.note(what, made - constant, constant)
        return
    constant = constant / layout.residual_multiplier
    if layout.null == "output_bias":
        bias = layout.attention + _OUTPUT_BIAS
        block.tensors[bias] = draft.value(constant, block.tensors[bias], what)
        return
    values, output = layout.attention + "v_proj.bias", layout.attention_writer
    one = torch.zeros(block.tensors[values].shape, dtype=torch.float64)
    one[0] = 1.0
    block.tensors[values] = draft.value(one, block.tensors[values], what)
    columns = torch.zeros(block.tensors[output].shape, dtype=torch.float64)
    columns[:, 0] = constant
    block.tensors[output] = draft.value(columns, block.tensors[output], what)


def post_norm_constant(
    constant: Tensor, offset: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (bias, stored gain), for which the norm of the bias is the constant; see above."""
    if offset == 0.0:
        ones = torch.ones_like(constant)
        return ones, constant * math.sqrt(1.0 + eps)
    size = float(constant.square().mean().sqrt())
    least = 1.25 * size - offset
    stored = torch.tensor(least, dtype=torch.float64).to(dtype)
    while float(stored) < least:
        stored = torch.nextafter(stored, torch.full_like(stored, torch.inf))
    share = size / (float(stored) + offset)
    square = eps * share**2 / (1.0 - share**2)
    gain = torch.full_like(constant, float(stored))
    return constant * (math.sqrt(square) / size), gain
