"""What a block computes between its stream and its writes, as functions of tensors.

A head's contribution is its share of what the attention adds to the stream: z_h W_O^h, through the
post-norm at the scale of the whole and the residual multiplier where a model has them. An output bias
is shared evenly, so that contributions add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.models.heads import HeadLayer, HeadProjection, heads_of
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import NormForm, read_norm

ROLES = ("query", "key", "value")
_KNOWN: WeakKeyDictionary[nn.Module, tuple[LayerAnatomy, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LayerAnatomy:
    """One layer.

    Attributes:
        heads: its attention taken apart.
        norm: form of the norm before the attention; None where there is none.
        mlp_norm: form of the norm before the MLP.
        attention_post: form of the norm on what the attention adds.
        multiplier: on what a sublayer adds.
    """

    heads: HeadLayer
    norm: NormForm | None
    mlp_norm: NormForm | None
    attention_post: NormForm | None
    multiplier: float

    def role(self, kind: str) -> HeadProjection:
        """Return the projection of queries, keys or values."""
        return getattr(self.heads, kind)

    def contributions(self, mixed: Tensor) -> Tensor:
        """Return what each head adds to the stream, `[heads, batch, seq, d_model]`, float32.

        `mixed` is what the output projection is given, `[batch, seq, heads * head_dim]`.
        """
        n = self.heads.n_heads
        by_head = mixed.float().unflatten(-1, (n, self.heads.head_dim))
        out = self.heads.out_weights().to(mixed.device).float()
        parts = torch.einsum("bshw,hdw->hbsd", by_head, out)
        bias = getattr(self.heads.output, "bias", None)
        if bias is not None:
            parts = parts + bias.float() / n
        if self.attention_post is not None:
            parts = self.attention_post.direct(parts, parts.sum(0))
            parts = parts + self.attention_post.shift.to(parts) / n
        return parts * self.multiplier

    def projected(self, kind: str, streams: Tensor) -> Tensor:
        """Return each head's rows of a projection, each read from a stream of its own.

        From streams `[heads of that kind, batch, seq, d_model]`, before the norm, to
        `[batch, seq, heads of that kind, head_dim]`.
        """
        role = self.role(kind)
        weights = role.weights().to(streams.device)
        normed = self.normed(streams, weights.dtype)
        count, rows, seq, width = normed.shape
        made = torch.bmm(normed.reshape(count, rows * seq, width), weights.transpose(1, 2))
        made = made.view(count, rows, seq, -1).permute(1, 2, 0, 3)
        bias = role.biases()
        return made if bias is None else made + bias.to(made)

    def normed(self, streams: Tensor, dtype: torch.dtype) -> Tensor:
        """Run the norm before the attention on streams of any leading shape."""
        norm = self.heads.norm
        return streams.to(dtype) if norm is None else norm(streams.to(dtype))


def anatomy_of(lm: LanguageModel) -> tuple[LayerAnatomy, ...]:
    """Return every layer's anatomy, read at first use; refuse a form that is not known."""
    found = _KNOWN.get(lm.model)
    if found is None:
        found = _KNOWN[lm.model] = tuple(
            LayerAnatomy(
                heads=layer,
                norm=_form(lm, layer.norm, index),
                mlp_norm=_form(lm, layer.mlp_norm, index),
                attention_post=_form(lm, layer.attention_post, index),
                multiplier=lm.sites.residual_multiplier,
            )
            for index, layer in enumerate(heads_of(lm))
        )
    return found


def _form(lm: LanguageModel, norm: nn.Module | None, layer: int) -> NormForm | None:
    if norm is None:
        return None
    like = next(lm.sites.blocks[layer].parameters())
    return read_norm(norm, lm.d_model, f"a norm of layer {layer} of {lm.name}", like)


def pulled_back(form: NormForm | None, stream: Tensor, cotangent: Tensor) -> Tensor:
    """Return the gradient by a norm's input from that by its output.

    With y = c(x) / rho and w' = g * w it is c(w' - y mean(w' y)) / rho, for the input x
    `[batch, seq, d_model]` and the gradient w by the output `[..., batch, seq, d_model]`.
    """
    if form is None:
        return cotangent
    values = form.center(stream.float())
    scale = (values.square().mean(-1, keepdim=True) + form.eps).rsqrt()
    unit = values * scale
    weighted = cotangent.float() * form.gain.to(stream.device, torch.float32)
    return form.center(weighted - unit * (weighted * unit).mean(-1, keepdim=True)) * scale
