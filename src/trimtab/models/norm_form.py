"""What a norm computes, found by what it does and not by its name: gain, centering, eps.

    norm(h) = g * c(h) / sqrt(mean(c(h)^2) + eps) + shift

with c(h) = h for an RMS norm and h - mean(h) for a LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError


@dataclass(frozen=True, eq=False)
class NormForm:
    """A norm in closed form.

    Attributes:
        gain: g, float64 `[d_model]`; Gemma's (1 + w) is already summed.
        shift: what is added, float64 `[d_model]`.
        centered: whether the mean is subtracted (LayerNorm).
        eps: inside the root.
    """

    gain: Tensor
    shift: Tensor
    centered: bool
    eps: float

    def center(self, values: Tensor) -> Tensor:
        """Subtract the mean where the norm does, `[..., d_model]`."""
        return values - values.mean(-1, keepdim=True) if self.centered else values

    def direct(self, part: Tensor, stream: Tensor) -> Tensor:
        """Return the share of norm(stream) that comes from a part of the stream, at its own scale.

        Parts of a stream add up: the shares of all parts and the shift make norm(stream).

        Args:
            part: `[..., d_model]`, one of the summands of the stream.
            stream: `[..., d_model]`.

        Returns:
            g * c(part) / sqrt(mean(c(stream)^2) + eps), in the stream's dtype.
        """
        values = self.center(stream.float())
        scale = (values.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        gain = self.gain.to(stream.device, torch.float32)
        return (self.center(part.float()) * scale * gain).to(stream.dtype)


@torch.no_grad()
def read_norm(norm: nn.Module, width: int, of: str, like: Tensor | None = None) -> NormForm:
    """Read a norm's form and check it against the module itself.

    Args:
        norm: the module, `[..., width]` to the same shape.
        width: d_model.
        of: what the norm is, for the error.
        like: a tensor of the dtype and device it works in, where it has no parameters.

    Raises:
        TrimtabError: neither an RMS norm nor a LayerNorm.
    """
    reference = next(norm.parameters(), like)
    reference = torch.zeros(1) if reference is None else reference
    generator = torch.Generator().manual_seed(0)

    def run(values: Tensor) -> Tensor:
        return norm(values.to(reference.device, reference.dtype)).cpu().double()

    x = torch.randn(3, width, generator=generator, dtype=torch.float64) * 4
    x = x.to(reference.dtype).double()  # what the norm will see, also in half precision
    shift = run(torch.zeros(width))
    centered = bool((run(torch.full((width,), 3.0)) - shift).abs().max() < 1e-2)
    names = ("variance_epsilon", "eps")
    eps = float(next((getattr(norm, name) for name in names if hasattr(norm, name)), 0))
    inner = x - x.mean(-1, keepdim=True) if centered else x
    scaled = inner / (inner.square().mean(-1, keepdim=True) + eps).sqrt()
    # Least squares over the rows: exact when the norm is a gain.
    gain = ((run(x) - shift) * scaled).sum(0) / scaled.square().sum(0)
    tolerance = 1e-4 if reference.dtype == torch.float32 else 3e-2
    wrong = float((run(x) - shift - gain * scaled).abs().max() / run(x).abs().max().clamp_min(1e-9))
    if wrong > tolerance:
        raise TrimtabError(
            asked=f"the closed form of {of}",
            found=f"a norm that is neither RMS nor LayerNorm (off by {wrong:.1e})",
            advice="use a measurement that needs no closed form, such as trimtab tune",
        )
    return NormForm(gain, shift, centered, eps)
