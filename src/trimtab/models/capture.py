"""Activations of prompts, in passes that stop at the deepest layer asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks, Tap
from trimtab.models.model import LanguageModel
from trimtab.models.replay import Stopped
from trimtab.models.sites import Site
from trimtab.results import Progress


@torch.no_grad()
def capture(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    *,
    positions: str | int = "last",
    site: str = "resid_post",
    progress: Progress | None = None,
) -> Tensor:
    """Read the activations of prompts at one kind of site, after active steering.

    Args:
        lm: The model.
        encoded: What `lm.encode` returned.
        layers: 0-based layers to read.
        positions: "last" prompt position; the last k prompt positions (an int); the mean over the
            "answer" (the completion's own tokens); or "post_instruction", the template's tokens
            between the last user text and the answer (the last ones that all prompts have).
        site: Kind of site.
        progress: Called with (prompts done, prompts in all) after each batch.

    Returns:
        float32 `[prompts, layers, positions, d_model]` on the CPU, in the caller's order.

    Raises:
        TrimtabError: No such site, or a prompt lacks the positions asked for.
    """
    spans = [_span(item, positions) for item in encoded]
    mean_over = positions == "answer"
    k = 1
    if not mean_over:
        k = min(stop - start for start, stop in spans)
        spans = [(stop - k, stop) for _, stop in spans]
        # What comes after the last position cannot reach it: leave it out.
        encoded = [_cut(item, stop) for item, (_, stop) in zip(encoded, spans, strict=True)]
    taps = {layer: lm.sites.reading(Site(site, layer)) for layer in layers}
    values, done = torch.empty(len(encoded), len(layers), k, lm.d_model), 0
    for batch in lm.batches(encoded):
        rows = batch.rows.tolist()
        pad = batch.input_ids.shape[1] - batch.attention_mask.sum(1, keepdim=True)
        bounds = pad + torch.tensor([spans[row] for row in rows], device=pad.device)
        found = _read(lm, taps, batch, bounds, mean_over)
        values[rows] = torch.stack([found[layer].cpu() for layer in layers], dim=1)
        done += len(rows)
        if progress is not None:
            progress(done, len(encoded))
    return values


def _span(encoded: Encoded, positions: str | int) -> tuple[int, int]:
    """The positions [start, stop) to read in one prompt."""
    end = encoded.prompt_length
    if positions == "last":
        return end - 1, end
    if isinstance(positions, int) and not isinstance(positions, bool):
        if 1 <= positions <= end:
            return end - positions, end
        raise TrimtabError(
            f"the last {positions} prompt positions",
            f"a prompt of {end} tokens",
            f"ask for 1 to {end}",
        )
    if positions == "answer":
        if encoded.completion_end is None or encoded.completion_end <= end:
            raise TrimtabError(
                "the mean over the answer",
                "a prompt without a completion",
                "give completions, or read at last",
            )
        return end, encoded.completion_end
    if positions == "post_instruction":
        if encoded.instruction_end < end:
            return encoded.instruction_end, end
        raise TrimtabError(
            "the post_instruction positions",
            "no tokens between the user's text and the answer (no chat template?)",
            "read at last",
        )
    raise TrimtabError(
        f"positions {positions!r}",
        "no such positions",
        "use last, post_instruction, answer or a whole number",
    )


def _cut(encoded: Encoded, stop: int) -> Encoded:
    return Encoded(encoded.text, encoded.ids[:stop], stop, min(encoded.instruction_end, stop))


def _read(
    lm: LanguageModel, taps: dict[int, Tap], batch: Batch, bounds: Tensor, mean_over: bool
) -> dict[int, Tensor]:
    """Read `[batch, positions, d_model]` of each layer in the padded columns [start, stop)."""
    found: dict[int, Tensor] = {}
    start, stop = bounds[:, :1], bounds[:, 1:]
    columns = torch.arange(batch.input_ids.shape[1], device=bounds.device)
    inside = (columns >= start) & (columns < stop)

    def keep(layer: int, scale: float, hidden: Tensor) -> None:
        chosen = inside.to(hidden.device)
        if mean_over:
            weight = chosen.float() / chosen.sum(1, keepdim=True)
            picked = torch.einsum("bs,bsd->bd", weight, hidden.float()).unsqueeze(1)
        else:
            picked = hidden[chosen].unflatten(0, (len(hidden), -1)).float()
        found[layer] = picked * scale if scale != 1 else picked
        if len(found) == len(taps):
            raise Stopped

    with Hooks() as hooks:
        for layer, tap in taps.items():
            hooks.at(tap, partial(keep, layer, tap.scale))
        try:
            lm.forward(batch, logits_to_keep=1)
        except Stopped:
            pass
    return found
