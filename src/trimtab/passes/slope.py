"""How logits begin to move: their derivative by the strength m at m = 0, for a whole steering.

s = d logits / d m, with all layers, their ratios and the scope fixed, comes from one forward-mode
Jacobian-vector product: the strength is a dual number 0 + 1 epsilon, and the model runs once. The
same run gives the derivative of the stream before the final norm. Where an operation of the
model has no forward derivative, a central difference takes its place and the reason is logged, once
per model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.errors import TrimtabError
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.steering.hooks import steered
from trimtab.steering.vector import VectorSteering

logger = logging.getLogger(__name__)

# Of the difference: this share of the stream's norm is small against the stream and large against
# float32 rounding (error about eps / h + h^2).
DIFFERENCE = 3e-3
# Models on which forward mode has failed, with the deepest first steered layer where it did: from there
# down it is not tried again.
_FAILED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Slope:
    """Logits and their derivative by m at the positions that predict one prompt's answer.

    Attributes:
        logits: float32 `[positions, vocab]`, at the strength asked for.
        slope: d logits / d m, float32 `[positions, vocab]`.
        stream: what enters the final norm, float32 `[positions, d_model]`.
        stream_slope: d stream / d m, float32 `[positions, d_model]`: sum over the steered layers of
            the network's Jacobian applied to the push.
        method: "jvp" or "difference".
    """

    logits: Tensor
    slope: Tensor
    stream: Tensor
    stream_slope: Tensor
    method: str


def slopes(
    lm: LanguageModel, vector: VectorSteering, encoded: Sequence[Encoded], at: float = 0.0
) -> Iterator[tuple[int, Slope]]:
    """Yield (index, Slope) of every prompt, batch by batch; a completion's tokens are read as well.

    Without a completion there is one position, the one that predicts the answer's first token;
    with one there is one for each of its tokens and its end.

    Args:
        lm: the unsteered model.
        vector: what is differentiated; its own strength does not matter.
        encoded: prompts from `lm.encode`.
        at: the strength m where the derivative is taken.

    Raises:
        TrimtabError: a model without a final norm, or values that are not finite.
    """
    vector.check(lm)
    if lm.sites.final_norm is None:
        raise TrimtabError(
            asked="the slope of the logits",
            found=f"no final norm in {lm.name}",
            advice="use a model whose last block is followed by a norm and the unembedding",
        )
    for batch in lm.batches(encoded, max_tokens=2048):
        found: _Parts | None = None
        if min(vector.layers) > _FAILED.get(lm.model, -1):
            try:
                found = _jvp(lm, vector, batch, encoded, at)
            except torch.OutOfMemoryError:
                raise  # a smaller batch helps, three passes of a difference do not
            except RuntimeError as error:  # what torch raises where an operation has no derivative
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("%s: no forward-mode derivative (%s); differences", lm.name, reason)
                _FAILED[lm.model] = min(vector.layers)
        method = "jvp" if found is not None else "difference"
        parts = found if found is not None else _difference(lm, vector, batch, encoded, at)
        width = parts[0].shape[1]
        for place, row in enumerate(batch.rows.tolist()):
            answer = len(encoded[row].ids) - encoded[row].prompt_length
            # Rows end together; the last column predicts what follows the answer.
            kept = slice(width - 1 - answer, width - 1) if answer else slice(width - 1, width)
            chosen = [part[place, kept].float().cpu() for part in parts]
            if not all(bool(part.isfinite().all()) for part in chosen):
                raise TrimtabError(
                    asked=f"the slope of the logits of {lm.name}",
                    found="values that are not finite",
                    advice="load the model in bfloat16 or float32",
                )
            logits, slope, stream, push = chosen
            yield row, Slope(logits, slope, stream, push, method)


_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _jvp(
    lm: LanguageModel, vector: VectorSteering, batch: Batch, encoded: Sequence[Encoded], at: float
) -> _Parts:
    """One forward pass on dual numbers: logits, their tangent, stream, its tangent."""
    n = len(encoded)
    # The fused attention kernels have no forward derivative; the plain one is a few products.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        factors = forward_ad.make_dual(torch.full((n,), at), torch.ones(n))
        with steered(lm, vector.at(1.0).edits(), row_factors=factors), final_stream(lm) as streams:
            logits = lm.forward(batch, logits_to_keep=_kept(batch, encoded))
        value, slope = forward_ad.unpack_dual(logits)
        stream, stream_slope = forward_ad.unpack_dual(streams[-1][:, -logits.shape[1] :])
    if slope is None or stream_slope is None:
        raise RuntimeError("the derivative is lost on the way to the logits")
    return value, slope, stream, stream_slope


def _difference(
    lm: LanguageModel, vector: VectorSteering, batch: Batch, encoded: Sequence[Encoded], at: float
) -> _Parts:
    """Three forward passes: the value, and a central difference."""

    def run(m: float) -> tuple[Tensor, Tensor]:
        factors = torch.full((len(encoded),), m)
        with torch.no_grad(), steered(lm, vector.at(1.0).edits(), row_factors=factors):
            with final_stream(lm) as streams:
                logits = lm.forward(batch, logits_to_keep=_kept(batch, encoded)).float()
        return logits, streams[-1][:, -logits.shape[1] :].float()

    value, stream = run(at)
    step = _step(vector, float(stream.norm(dim=-1).mean()))
    (before, h_before), (after, h_after) = run(at - step), run(at + step)
    return value, (after - before) / (2 * step), stream, (h_after - h_before) / (2 * step)


def _step(vector: VectorSteering, norm: float) -> float:
    """The m at which all pushes together are `DIFFERENCE` of the stream; `norm` where none is known."""
    if vector.operation != "add":
        return DIFFERENCE
    shares = [vector.scales[k] / vector.norms.get(k, norm) for k in vector.layers]
    total = sum(share**2 for share in shares) ** 0.5
    return DIFFERENCE / total if total else DIFFERENCE


def _kept(batch: Batch, encoded: Sequence[Encoded]) -> int:
    answers = [len(encoded[row].ids) - encoded[row].prompt_length for row in batch.rows.tolist()]
    return max(answers) + 1


@contextmanager
def final_stream(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """Record what enters the final norm `[batch, seq, d_model]`, one entry per call of the model."""
    seen: list[Tensor] = []

    assert lm.sites.final_norm is not None  # checked by the caller
    with Hooks() as hooks:
        hooks.before(lm.sites.final_norm, seen.append)
        yield seen
