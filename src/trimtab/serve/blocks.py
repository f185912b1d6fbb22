"""The additions to the stream: hooks on a served model's blocks, traced into its graph.

A block of vLLM returns the hidden states, or (hidden states, residual) whose sum is the stream, so
what is added to the first is added to the stream. Every rank of a tensor-parallel group holds the
whole stream and adds the same; a rank of a pipeline adds after the blocks that it holds.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.serve.registry import EMBEDDED, VectorRegistry
from trimtab.serve.step import StepWeights, addition

_HIDDEN = "hidden_states"


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """Return the decoder's stack: the one outermost list of as many modules as there are layers.

    Raises:
        TrimtabError: None, or several.
    """
    language_model = getattr(model, "get_language_model", None)
    root = language_model() if callable(language_model) else model
    assert isinstance(root, nn.Module)
    found = _outermost(root, n_layers)
    if len(found) != 1:
        raise TrimtabError(
            asked=f"to steer {type(model).__name__}",
            found=f"{len(found)} lists of {n_layers} blocks",
            advice="serve a decoder-only language model",
        )
    return found[0]


def install(model: nn.Module, registry: VectorRegistry, step: StepWeights, missing: type) -> list[int]:
    """Put the registered vectors after their blocks; before anything is compiled.

    Blocks that another rank holds are of the class `missing`. Returns the layers that this rank adds
    after.
    """
    blocks = find_blocks(model, registry.served.n_layers)
    mine = []
    for layer in registry.layers:
        block = blocks[max(layer, 0)]
        if isinstance(block, missing):
            continue
        vectors = registry.vectors(layer).to(step.values.device)
        if layer == EMBEDDED:
            _register(block, "trimtab_entering", step.values, vectors)
            block.register_forward_pre_hook(_entering(block), with_kwargs=True)
        else:
            _register(block, "trimtab_leaving", step.values, vectors)
            block.register_forward_hook(_leaving)
        mine.append(layer)
    return mine


def _register(block: nn.Module, name: str, values: Tensor, vectors: Tensor) -> None:
    # As buffers they are inputs of the graph, and are seen afresh at every step.
    block.register_buffer(f"{name}_values", values, persistent=False)
    block.register_buffer(f"{name}_vectors", vectors, persistent=False)


def _leaving(block: Any, args: tuple, output: object) -> object:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise TrimtabError(
            asked=f"to steer after {type(block).__name__}",
            found=f"a block that returns a {type(output).__name__}",
            advice="serve a model whose blocks return hidden states, alone or with a residual",
        )
    moved = hidden + addition(block.trimtab_leaving_values, block.trimtab_leaving_vectors, hidden)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


def _entering(block: nn.Module) -> Any:
    names = list(inspect.signature(block.forward).parameters)
    if _HIDDEN not in names:
        raise TrimtabError(
            asked=f"to steer what enters {type(block).__name__}",
            found=f"no argument {_HIDDEN}, but {', '.join(names)}",
            advice="use site resid_post",
        )
    place = names.index(_HIDDEN)

    def hook(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = kwargs[_HIDDEN] if _HIDDEN in kwargs else args[place]
        values, vectors = block.trimtab_entering_values, block.trimtab_entering_vectors
        moved = hidden + addition(values, vectors, hidden)
        if _HIDDEN in kwargs:
            return args, {**kwargs, _HIDDEN: moved}
        return (*args[:place], moved, *args[place + 1 :]), kwargs

    return hook


def _outermost(module: nn.Module, length: int) -> list[nn.ModuleList]:
    if isinstance(module, nn.ModuleList) and len(module) == length:
        return [module]
    return [found for child in module.children() for found in _outermost(child, length)]
