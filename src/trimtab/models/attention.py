"""Seeing and changing attention while a model runs: queries, keys, values, probabilities.

Models call attention through the library's own registry of attention functions; inside `attending`
a model uses one that asks a handler first. No module and no weight is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.opened import opened, values
from trimtab.models.probe import text_config

NAME = "trimtab_attending"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention of one forward pass, after rotation and norms of queries and keys.

    Attributes:
        layer: 0-based.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`, those from a cache included.
        value: like `key`.
        mask: added to the scores, `[batch or 1, 1, queries, keys]`; None for nothing.
        scaling: factor on the scores.
        softcap: c of c tanh(score / c) (Gemma 2), or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def probabilities(self) -> Tensor:
        """Return softmax(mask + cap(scaling q k)), `[batch, heads, queries, keys]`."""
        key = self._per_head(self.key)
        scores = self.query @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            scores = scores + self.mask[..., : key.shape[-2]]
        return scores.softmax(-1, dtype=torch.float32).to(self.query.dtype)

    def mix(self, probabilities: Tensor, value: Tensor | None = None) -> Tensor:
        """Return the values weighted by probabilities, `[batch, queries, heads, head_dim]`."""
        value = self._per_head(self.value if value is None else value)
        return (probabilities @ value).transpose(1, 2).contiguous()

    def _per_head(self, shared: Tensor) -> Tensor:
        """Keys or values of grouped queries, once for every head."""
        return shared.repeat_interleave(self.query.shape[1] // shared.shape[1], dim=1)


Handler: TypeAlias = "Callable[[AttentionCall], Tensor | None]"
_LOCK = threading.Lock()
_OPEN_BLOCKS: dict[int, int] = {}


@contextmanager
def attending(lm: LanguageModel, handler: Handler) -> Iterator[None]:
    """Ask `handler` at every attention of every call that this thread or task makes inside.

    It returns the mixed values `[batch, queries, heads, head_dim]`, or None for the plain ones. Where
    contexts are nested, the inner handler is asked. Gradients flow.

    Raises:
        TrimtabError: In a call, attention with terms that are not known here.
    """
    config = text_config(lm.model)
    layers = {module: layer for layer, module in enumerate(lm.sites.attention)}
    with _LOCK:
        # The name of the function is read from the configuration in each call of the model.
        if not isinstance(config, _Asked):
            config.__class__ = _asked(type(config))
        _OPEN_BLOCKS[id(config)] = _OPEN_BLOCKS.get(id(config), 0) + 1
    try:
        with opened(_Asked, "handler", (config, layers, handler)):
            yield
    finally:
        with _LOCK:
            _OPEN_BLOCKS[id(config)] -= 1
            if not _OPEN_BLOCKS[id(config)]:
                del _OPEN_BLOCKS[id(config)]
                config.__class__ = type(config).__bases__[1]


class _Asked:
    """Marks a configuration that names our attention to whoever has a handler open."""


@cache
def _asked(kind: type) -> type:
    """A class of configurations like `kind`."""

    def name(config: Any) -> str | None:
        asked = any(config is mine for mine, _, _ in values(_Asked, "handler"))
        return NAME if asked else kind._attn_implementation.fget(config)

    attention = property(name, kind._attn_implementation.fset)
    return type(kind.__name__, (_Asked, kind), {"_attn_implementation": attention})


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that the registry knows: [batch, queries, heads, head_dim]."""
    if more.get("s_aux") is not None or dropout:
        raise TrimtabError(
            f"to look into {type(module).__name__}",
            "attention sinks" if not dropout else "dropout in a model that is being trained",
            "use a model whose attention is a plain softmax of scores, in eval mode",
        )
    found = reversed(values(_Asked, "handler"))
    layer, handler = next((layers[module], ask) for _, layers, ask in found if module in layers)
    scale = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    call = AttentionCall(layer, query, key, value, attention_mask, scale, softcap)
    mixed = handler(call)
    return (call.mix(call.probabilities()) if mixed is None else mixed), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
