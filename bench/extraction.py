"""How fast activations are read, against the loops people write by hand.

Baseline `one_prompt_at_a_time`: `model(ids, output_hidden_states=True)` per prompt, the last token
of each layer kept. `padded_batches`: the same in padded batches of 16 in the order given. All read
the same values; the greatest difference is reported.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from common import WORDS, arguments, benched_models, compared, emit, interleaved
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.steering.layers import default_layers

BASELINE = "one_prompt_at_a_time"


def prompts(count: int = 512, seed: int = 0) -> list[str]:
    """Return prompts of 4 to 40 words, as 256 pairs have."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 40))) for _ in range(count)]


@torch.no_grad()
def one_at_a_time(lm: LanguageModel, texts: list[str], layers: tuple[int, ...]) -> Tensor:
    """Return `[prompts, layers, d_model]`, one forward per prompt."""
    rows = []
    for text in texts:
        ids = torch.tensor([lm.encode(text).ids], device=lm.device)
        states = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(torch.stack([states[layer + 1][0, -1].float() for layer in layers]))
    return torch.stack(rows)


@torch.no_grad()
def padded(lm: LanguageModel, texts: list[str], layers: tuple[int, ...], size: int = 16) -> Tensor:
    """Return `[prompts, layers, d_model]`, padded batches in the order given."""
    rows = []
    for start in range(0, len(texts), size):
        encoded = [lm.encode(text).ids for text in texts[start : start + size]]
        width = max(map(len, encoded))
        ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded], device=lm.device)
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = lm.model(
            ids,
            attention_mask=mask.to(lm.device),
            position_ids=positions.to(lm.device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        rows.append(torch.stack([states[layer + 1][:, -1].float() for layer in layers], dim=1))
    return torch.cat(rows)


def ours(lm: LanguageModel, texts: list[str], layers: tuple[int, ...]) -> Tensor:
    """Return the values."""
    return capture(lm, [lm.encode(text) for text in texts], layers)[:, :, 0]


def main() -> None:
    """Time every way on every model."""
    options = arguments(__doc__ or "", repeats=5)
    texts = prompts()
    results: list[dict[str, object]] = []
    for lm in benched_models():
        # The last block's hidden state is left out: transformers gives it after the final norm.
        layers = tuple(layer for layer in default_layers(lm.n_layers) if layer < lm.n_layers - 1)
        exact = one_at_a_time(lm, texts, layers)
        difference = (ours(lm, texts, layers) - exact.cpu()).abs().max()
        runs = {
            BASELINE: lambda lm=lm, layers=layers: one_at_a_time(lm, texts, layers),
            "padded_batches": lambda lm=lm, layers=layers: padded(lm, texts, layers),
            "capture_values": lambda lm=lm, layers=layers: ours(lm, texts, layers),
        }
        results.append(
            {
                "model": lm.name,
                "prompts": len(texts),
                "layers_read": list(layers),
                "baseline": BASELINE,
                "greatest_difference_to_baseline": float(difference),
                "greatest_value": float(exact.abs().max()),
                "runs": compared(interleaved(runs, options.repeats), BASELINE),
            }
        )
    emit("extraction", results, options.json)


if __name__ == "__main__":
    main()
