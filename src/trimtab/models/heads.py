"""The heads of every attention: which rows of which projection make their queries, keys and values.

Names only propose the projections; that a head's values are the rows they are taken for, and that its
output enters the stream through the columns it is taken for, is checked by the numbers of one tiny
forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import TrimtabError
from trimtab.models.attention import AttentionCall, attending
from trimtab.models.hooking import Hooks, first_tensor, input_tensor
from trimtab.models.model import LanguageModel

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj")
_KNOWN: WeakKeyDictionary[nn.Module, tuple[HeadLayer, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class HeadProjection:
    """One role (queries, keys or values) of one attention.

    Attributes:
        module: the linear module that computes it; roles may share one.
        rows: which of its outputs belong to each head, `[heads, head_dim]`.
    """

    module: nn.Module
    rows: Tensor

    def weights(self) -> Tensor:
        """Return every head's rows, `[heads, head_dim, d_model]`, in the model's own dtype."""
        return _matrix(self.module)[self.rows]

    def biases(self) -> Tensor | None:
        """Return every head's bias `[heads, head_dim]`; None without."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias[self.rows]


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """The attention of one layer, taken apart.

    Attributes:
        query: rows of each head.
        key: rows of each key-value head.
        value: the same.
        output: the projection back to the stream.
        norm: between the block's input and the attention; None where it reads the stream itself.
        mlp_norm: between the middle of the block (its input, in a parallel model) and the MLP.
        attention_post: norm on what the attention adds; None without.
    """

    query: HeadProjection
    key: HeadProjection
    value: HeadProjection
    output: nn.Module
    norm: nn.Module | None
    mlp_norm: nn.Module | None
    attention_post: nn.Module | None

    @property
    def n_heads(self) -> int:
        """How many queries attend side by side."""
        return self.query.rows.shape[0]

    @property
    def n_kv_heads(self) -> int:
        """How many keys and values they share."""
        return self.value.rows.shape[0]

    @property
    def head_dim(self) -> int:
        """Width of one head's values."""
        return self.value.rows.shape[1]

    def out_weights(self) -> Tensor:
        """Return all columns by head, `[heads, d_model, head_dim]`, in the model's own dtype."""
        matrix = _matrix(self.output)
        return matrix.unflatten(1, (self.n_heads, self.head_dim)).permute(1, 0, 2)


def heads_of(lm: LanguageModel) -> tuple[HeadLayer, ...]:
    """Return the attention of every layer taken apart, found at first use by one tiny forward.

    Raises:
        TrimtabError: an attention whose projections are not known, or that the numbers contradict.
    """
    found = _KNOWN.get(lm.model)
    if found is None:
        found = _KNOWN[lm.model] = find_heads(lm)
    return found


@torch.no_grad()
def find_heads(lm: LanguageModel) -> tuple[HeadLayer, ...]:
    """Take every attention apart and check it; see `heads_of`, which remembers."""
    calls: dict[int, AttentionCall] = {}
    entered: dict[nn.Module, Tensor] = {}
    left: dict[nn.Module, Tensor] = {}

    # What is hooked here only may be what it is taken for: nothing is assumed of its tensors.
    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        for kept, found in ((entered, input_tensor(args, kwargs)), (left, first_tensor(output))):
            if found is not None:
                kept[module] = found

    batch = next(iter(lm.batches([lm.encode("Hello there")])))
    with Hooks() as hooks:
        for block, attention in zip(lm.sites.blocks, lm.sites.attention, strict=True):
            for part in (*block.children(), *attention.children()):
                hooks.calls(part, after=partial(keep, part))
        with attending(lm, lambda call: calls.update({call.layer: call})):
            lm.forward(batch)
    return tuple(_layer(lm, layer, calls, entered, left) for layer in range(lm.n_layers))


def _layer(
    lm: LanguageModel,
    layer: int,
    calls: dict[int, AttentionCall],
    entered: dict[nn.Module, Tensor],
    left: dict[nn.Module, Tensor],
) -> HeadLayer:
    module, out = lm.sites.attention[layer], lm.sites.attention_writer[layer]
    if out is None:
        raise _unknown(lm, layer, "no output projection")
    call = calls.get(layer)
    if call is None or not {module, out} <= entered.keys():
        raise _unknown(lm, layer, "attention that does not go through the library's registry")
    heads, kv_heads, width = call.query.shape[1], call.value.shape[1], call.value.shape[3]
    layouts = _layouts(lm, layer, module, heads, kv_heads, width)
    roles = next((r for r in layouts if torch.equal(_values(r[2], left), call.value)), None)
    if roles is None:
        raise _unknown(lm, layer, "values that are not rows of its value projection")
    _check_linear(lm, layer, out)
    mixed = entered[out]
    if mixed.shape[-1] != heads * width:
        raise _unknown(lm, layer, f"{mixed.shape[-1]} mixed values for {heads} heads")
    parts = lm.sites.blocks[layer].children()
    found = HeadLayer(
        *roles,
        output=out,
        norm=next((part for part in parts if left.get(part) is entered[module]), None),
        mlp_norm=_other(lm.sites.middle[layer], lm.sites.mlp[layer]),
        attention_post=_other(lm.sites.attention_added[layer], module),
    )
    by_head = mixed.unflatten(-1, (heads, width)).float()
    total = torch.einsum("bshw,hdw->bsd", by_head, found.out_weights().float())
    bias = getattr(out, "bias", None)
    total, true = total if bias is None else total + bias.float(), left[module]
    wrong = float((total - true.float()).abs().max() / true.abs().max().clamp_min(1e-9))
    if not wrong <= (1e-4 if true.dtype == torch.float32 else 5e-2):
        raise _unknown(lm, layer, f"heads that do not add up to its output (off by {wrong:.1e})")
    return found


Roles: TypeAlias = tuple[HeadProjection, HeadProjection, HeadProjection]


def _layouts(
    lm: LanguageModel, layer: int, module: nn.Module, heads: int, kv_heads: int, width: int
) -> list[Roles]:
    """Ways in which queries, keys and values may lie in the projections that the names propose."""
    children = dict(module.named_children())
    for names in SEPARATE:
        if all(name in children for name in names):
            parts = [children[name] for name in names]
            for part in parts:
                _check_linear(lm, layer, part)
            q, k, v = (
                HeadProjection(part, torch.arange(count * width).view(count, width))
                for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
            )
            return [(q, k, v)]
    fused = next((children[name] for name in FUSED if name in children), None)
    if fused is None:
        raise _unknown(lm, layer, f"no projections among {', '.join(children)}")
    _check_linear(lm, layer, fused)
    rows = torch.arange(_matrix(fused).shape[0])
    if len(rows) != (heads + 2 * kv_heads) * width:
        raise _unknown(lm, layer, f"a fused projection of {len(rows)} outputs")
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    layouts = [tuple(part.view(-1, width) for part in rows.split(sizes))]
    if heads == kv_heads:
        # Each head's query, key and value side by side.
        layouts.append(tuple(rows.view(heads, 3, width).unbind(1)))
    return [
        (HeadProjection(fused, q), HeadProjection(fused, k), HeadProjection(fused, v))
        for q, k, v in layouts
    ]


def _values(role: HeadProjection, outputs: dict[nn.Module, Tensor]) -> Tensor:
    """What a role's rows make, `[batch, heads, seq, head_dim]`."""
    made = outputs[role.module][..., role.rows.flatten()]
    return made.unflatten(-1, tuple(role.rows.shape)).transpose(1, 2)


def _other(module: nn.Module, itself: nn.Module) -> nn.Module | None:
    """A module that stands between; None where there is none, or only a dropout."""
    return None if module is itself or isinstance(module, nn.Dropout) else module


def _matrix(module: nn.Module) -> Tensor:
    """A linear module's weight `[out, in]`."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _check_linear(lm: LanguageModel, layer: int, module: nn.Module) -> None:
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise _unknown(lm, layer, f"a projection of the kind {type(module).__name__}")


def _unknown(lm: LanguageModel, layer: int, found: str) -> TrimtabError:
    return TrimtabError(
        asked=f"the heads of layer {layer} of {lm.name} ({type(lm.sites.attention[layer]).__name__})",
        found=found,
        advice="use a model with query, key, value and output projections, not quantized",
    )
