"""From the final stream to the logits: norm, unembedding, scale and cap, checked by numbers.

Along a ray h + alpha v before the final norm everything is closed form for every alpha:

    logit_z = (A_z + alpha B_z) / rho(alpha) + C_z
    rho^2 = (|h|^2 + 2 alpha h.v + alpha^2 |v|^2) / d + eps

with A = W (g * h), B = W (g * v), C = W beta plus the unembedding's bias; a LayerNorm centers h and
v first. alpha -> infinity leaves sqrt(d) B_z / |v| + C_z: the plateau needs no forward pass, and its
largest entry is the token that the model collapses into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import read_norm
from trimtab.models.probe import text_config
from trimtab.passes.slope import final_stream
from trimtab.steering.vector import VectorSteering

STREAM_SITES = ("embed", "resid_pre", "resid_mid", "resid_post")
ROWS = 8192  # of the unembedding that are in float64 at a time


@dataclass(frozen=True, eq=False)
class Head:
    """The last steps of a model, read from its modules; make one with `read_head`.

    Attributes:
        gain: of the final norm, float64 `[d_model]`.
        centered: whether the norm subtracts the mean (LayerNorm).
        eps: inside the norm's root.
        weight: the model's own unembedding `[vocab, d_model]`, not a copy.
        constant: what the norm's shift and the unembedding's bias add, float64 `[vocab]`.
        scale: factor on the logits.
        cap: soft cap c of the logits, c tanh(x / c); None for none.
    """

    gain: Tensor
    centered: bool
    eps: float
    weight: Tensor
    constant: Tensor
    scale: float
    cap: float | None

    def logits(self, stream: Tensor) -> Tensor:
        """Return the logits `[..., vocab]`, float64, of streams `[..., d_model]`."""
        return self.along(stream, torch.zeros_like(stream), 0.0)

    def along(self, stream: Tensor, push: Tensor, alpha: float | Tensor) -> Tensor:
        """Return the logits of stream + alpha * push, in closed form.

        Args:
            stream: `[n, d_model]`.
            push: `[n, d_model]` or `[d_model]`.
            alpha: number, or `[n]` one per row.

        Returns:
            float64 `[n, vocab]`.
        """
        h, v = self._center(stream.double()), self._center(push.double())
        alpha = torch.as_tensor(alpha, dtype=torch.float64)[..., None]
        squares = (
            h.square().sum(-1, keepdim=True)
            + 2 * alpha * (h * v).sum(-1, keepdim=True)
            + alpha.square() * v.square().sum(-1, keepdim=True)
        )
        rho = (squares / self.gain.numel() + self.eps).sqrt()
        a, b = self._unembed(h * self.gain), self._unembed(v * self.gain)
        return self._finish((a + alpha * b) / rho)

    def limit(self, push: Tensor, sign: int = 1) -> Tensor:
        """Return the logits `[..., vocab]` of alpha -> sign * infinity along a push `[..., d_model]`.

        Raises:
            TrimtabError: a push of which the norm leaves nothing.
        """
        v = self._center(push.double())
        sizes = v.norm(dim=-1, keepdim=True)
        if not bool((sizes > 1e-9 * push.double().norm(dim=-1, keepdim=True)).all()):
            raise TrimtabError(
                asked="the logits of an infinite push",
                found="a push of length 0" + (" beside its mean" if self.centered else ""),
                advice="use layers whose pushes do not cancel",
            )
        v = sign * v / (sizes / v.shape[-1] ** 0.5)
        return self._finish(self._unembed(v * self.gain))

    def _unembed(self, values: Tensor) -> Tensor:
        # In pieces: a whole vocabulary in float64 would be several times the model's own matrix.
        pieces = self.weight.split(ROWS)
        return torch.cat([values @ piece.cpu().double().T for piece in pieces], dim=-1)

    def _center(self, values: Tensor) -> Tensor:
        return values - values.mean(-1, keepdim=True) if self.centered else values

    def _finish(self, projected: Tensor) -> Tensor:
        out = (projected + self.constant) * self.scale
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)


@torch.no_grad()
def read_head(lm: LanguageModel) -> Head:
    """Read the head of a model and check it against the norm itself and the logits of one short text.

    The norm's kind is found by what it does to a constant vector and to zero, not by its name.

    Raises:
        TrimtabError: the final norm or the logits are none of the known forms.
    """
    norm, unembedding = lm.sites.final_norm, lm.sites.unembedding
    config = text_config(lm.model)
    if norm is None:
        raise _unknown(lm, "no final norm")
    reference = next(norm.parameters(), next(unembedding.parameters()))
    form = read_norm(norm, lm.d_model, f"the final norm of {lm.name}", reference)
    constant = unembedding(form.shift.to(reference.device, reference.dtype)).cpu().double()
    head = Head(
        gain=form.gain,
        centered=form.centered,
        eps=form.eps,
        weight=next(unembedding.parameters()).detach(),
        constant=constant,
        scale=_scale(config),
        cap=getattr(config, "final_logit_softcapping", None),
    )
    tolerance = 1e-4 if reference.dtype == torch.float32 else 3e-2
    with final_stream(lm) as streams:
        batch = next(iter(lm.batches([lm.encode("Hello")])))
        logits = lm.forward(batch, logits_to_keep=1)[0, -1].cpu().double()
    wrong = float((head.logits(streams[-1][0, -1].cpu()) - logits).abs().max() / logits.abs().max())
    if wrong > tolerance:
        raise _unknown(lm, f"logits that are not scale and cap of W x + b (off by {wrong:.1e})")
    return head


def collapse_logits(lm: LanguageModel, vector: VectorSteering, sign: int = 1) -> Tensor:
    """Return the logits `[vocab]` of a steered position as m -> sign * infinity, no steered pass needed.

    Blocks read the stream through a norm, so what they add stays bounded, and the pushes of all
    layers add up in the stream: its direction tends to that of sum_l scales[l] c_l, whatever the
    layers. (It holds where the position itself is steered.)

    Raises:
        TrimtabError: a steering that adds nothing, pushes that cancel, or a head of no known form.
    """
    if vector.operation != "add" or vector.site not in STREAM_SITES:
        raise TrimtabError(
            asked=f"the limit of {vector.operation} at {vector.site}",
            found="no push that grows with the strength in the stream itself",
            advice=f"use operation add at one of {', '.join(STREAM_SITES)}",
        )
    push = torch.stack([vector.scales[k] * vector.directions[k].double() for k in vector.layers])
    return read_head(lm).limit(push.sum(0), sign)


def _scale(config: Any) -> float:
    """The factor on the logits: Granite divides, Cohere multiplies."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _unknown(lm: LanguageModel, found: str) -> TrimtabError:
    return TrimtabError(
        asked=f"the closed form of the last steps of {lm.name}",
        found=found,
        advice="use the measured curve (trimtab tune) instead of the prediction",
    )
