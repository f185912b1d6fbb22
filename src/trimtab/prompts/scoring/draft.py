"""The draft model of a search: the same model in bfloat16, where that is much faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from trimtab.models.model import LanguageModel


def worthwhile(lm: LanguageModel) -> bool:
    """Whether a bfloat16 copy ranks much faster than the model itself.

    On GPUs, and on processors that multiply bfloat16 in tiles; never where the model has two bytes
    a weight already, nor inside a steering context, whose hooks belong to the model.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    if hooked or lm.model.dtype not in (torch.float32, torch.float64):
        return False
    if lm.device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16", False))
    return lm.device.type == "cuda" and torch.cuda.is_bf16_supported()


def bfloat16_copy(lm: LanguageModel) -> LanguageModel:
    """Copy the weights in bfloat16; buffers, such as rotary frequencies, stay as precise."""
    copies: dict[int, object] = {}
    for parameter in lm.model.parameters():
        half: Tensor = parameter.detach().to(torch.bfloat16)
        copies[id(parameter)] = nn.Parameter(half, requires_grad=False)
    model = copy.deepcopy(lm.model, copies)
    model.config.dtype = torch.bfloat16
    return LanguageModel(model, lm.tokenizer, f"{lm.name} (draft)")
