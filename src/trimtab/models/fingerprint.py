"""The fingerprint of a model: unmoved by a cast of dtype, moved by any edit of a weight."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.probe import text_config

# Below this, float16 has no longer the eight significant bits of bfloat16.
_FLUSHED = 2.0**-13
_CHUNK = 1 << 22


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture and every parameter; those that accelerate holds elsewhere are fetched.

    Samples of a weight would miss a changed bias entry, and sums of floats depend on order and
    dtype. So each value is rounded to bfloat16, values too small for float16 to hold exactly become
    zero, and the 16 bits are summed as whole numbers along rows and along columns: exact in any
    order, equal on every device, and equal for a bfloat16 model cast to float32 or float16. A
    change of any one value changes its row's sum. Short parameters are hashed value by value.
    """
    config = text_config(model)
    digest = hashlib.sha256()
    head = (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size)
    digest.update(repr(head).encode())
    # In the module tree's order and without names, which change between releases of transformers.
    for name, parameter in model.named_parameters():
        value = _offloaded(model, name) if parameter.is_meta else parameter.detach()
        if value is None:
            continue
        digest.update(repr(tuple(parameter.shape)).encode())
        for numbers in _numbers(value):
            digest.update(numbers.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _offloaded(model: PreTrainedModel, name: str) -> Tensor | None:
    """A parameter that `device_map` put into main memory or on disk, where only hooks fetch it."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return weights[leaf]
    return None


def _numbers(values: Tensor) -> list[Tensor]:
    """Whole numbers that stand for a tensor: its bits, or their sums along rows and columns."""
    if values.ndim < 2:
        return [_bits(values)]
    table = values.reshape(values.shape[0], -1)
    rows: list[Tensor] = []
    columns = torch.zeros(table.shape[1], dtype=torch.int32, device=table.device)
    # In pieces, so that a large embedding costs no second copy of itself. Sums that leave 32 bits
    # wrap around, alike in any order; they are many times faster than sums in 64.
    for piece in table.split(max(1, _CHUNK // max(1, table.shape[1]))):
        bits = _bits(piece)
        rows.append(bits.sum(1, dtype=torch.int32))
        columns += bits.sum(0, dtype=torch.int32)
    return [*rows, columns]


def _bits(values: Tensor) -> Tensor:
    """Each value's bfloat16 bits as int32; whole numbers stay as they are."""
    if not values.is_floating_point():
        return values.to(torch.int32)
    # hardshrink gives a plus zero for all that is small, minus zero as well.
    kept = torch.nn.functional.hardshrink(values.to(torch.bfloat16), _FLUSHED)
    return kept.view(torch.int16).to(torch.int32)
