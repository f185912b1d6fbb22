"""What steering costs while text is generated.

Baseline `unsteered`: the same `generate` call with no hook. `plain_hook` is what a user writes by
hand, `output + v` on one block. Strengths are so small that every run writes the same greedy text,
so equal work is compared; that the texts are equal is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from common import arguments, benched_models, compared, emit, interleaved
from trimtab.models.model import LanguageModel
from trimtab.steering.layers import default_layers
from trimtab.steering.vector import VectorSteering

BASELINE = "unsteered"
PROMPT = "please how borrow the ledger today"
NEW_TOKENS = 48
TINY = 1e-6


@contextmanager
def plain_hook(lm: LanguageModel, layer: int, v: torch.Tensor) -> Iterator[None]:
    """Add `v` to one block's output, the way a notebook does."""

    def hook(_module, _args, output):
        if isinstance(output, torch.Tensor):
            return output + v
        return (output[0] + v, *output[1:])

    handle = lm.sites.blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def generate(
    lm: LanguageModel, lever: Callable[[], AbstractContextManager[None]], batch: int
) -> list[str]:
    """Answer a batch greedily inside the lever."""
    with lever():
        return lm.generate([PROMPT] * batch, max_new_tokens=NEW_TOKENS)


def main() -> None:
    """Time every way of steering on every model."""
    options = arguments(__doc__ or "", repeats=9)
    results: list[dict[str, object]] = []
    for lm in benched_models():
        generator = torch.Generator().manual_seed(0)
        layers = default_layers(lm.n_layers)
        found = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
        many = VectorSteering.from_directions(lm, found, alpha=TINY)
        one = many.select(layers=[layers[0]])
        v = (TINY * found[layers[0]]).to(lm.device, lm.model.dtype)
        for batch in (1, 16):
            levers: dict[str, Callable[[], AbstractContextManager[None]]] = {
                BASELINE: nullcontext,
                "plain_hook": partial(plain_hook, lm, one.layers[0], v),
                "one_layer": partial(one.on, lm),
                "one_layer_last": partial(one.select(scope="last").on, lm),
                "default_layers": partial(many.on, lm),
                "default_layers_row_strengths": partial(many.on, lm, [1.0] * batch),
            }
            runs = {name: partial(generate, lm, lever, batch) for name, lever in levers.items()}
            texts = [run() for run in runs.values()]
            results.append(
                {
                    "model": lm.name,
                    "batch": batch,
                    "new_tokens": NEW_TOKENS,
                    "baseline": BASELINE,
                    "same_text": all(text == texts[0] for text in texts),
                    "runs": compared(interleaved(runs, options.repeats), BASELINE),
                }
            )
    emit("steered_generation", results, options.json)


if __name__ == "__main__":
    main()
