"""Activations of prompts: values or running statistics, stopping at the deepest layer asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.chat import Encoded
from trimtab.models.hooking import Hooks
from trimtab.models.sites import Site
from trimtab.results import Progress

if TYPE_CHECKING:
    from trimtab.models.model import Batch, LanguageModel


@dataclass(frozen=True, eq=False)
class Activations:
    """What was read at a site of some layers.

    Attributes:
        layers: The layers, in the order of the second axis below.
        site: Kind of site.
        values: float32 `[prompts, layers, positions, d_model]` in the caller's order, or None if
            not collected.
        mean: Mean over prompts, float64 `[layers, positions, d_model]`.
        second_moment: Mean of the squares, float64 `[layers, positions, d_model]`.
        count: Number of prompts.
    """

    layers: tuple[int, ...]
    site: str
    values: Tensor | None
    mean: Tensor
    second_moment: Tensor
    count: int


class _Stop(Exception):
    """Ends a forward pass whose remaining layers nobody reads."""


@torch.no_grad()
def capture(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    *,
    positions: str | int = "last",
    site: str = "resid_post",
    collect: bool = True,
    progress: Progress | None = None,
) -> Activations:
    """Read the activations of prompts at one kind of site.

    Args:
        lm: The model; active steering acts before the reading.
        encoded: What `lm.encode` returned.
        layers: 0-based layers to read.
        positions: "last" prompt position; the last k prompt positions (an int); the mean over the
            "answer" (the completion's own tokens); or "post_instruction", the template's tokens
            between the last user text and the answer (the last ones that all prompts have).
        site: Kind of site.
        collect: Keep every value, not only the statistics.
        progress: Called with (prompts done, prompts in all) after each batch.

    Raises:
        TrimtabError: No prompts, no such site, or a prompt lacks the positions asked for.
    """
    if not encoded or not layers:
        raise TrimtabError(
            f"activations of {len(encoded)} prompts at {len(layers)} layers",
            "nothing to read",
            "give at least one prompt and one layer",
        )
    spans = [_span(item, positions) for item in encoded]
    mean_over = positions == "answer"
    k = 1
    if not mean_over:
        k = min(stop - start for start, stop in spans)
        spans = [(stop - k, stop) for _, stop in spans]
        # What comes after the last position cannot reach it: leave it out.
        encoded = [_cut(item, stop) for item, (_, stop) in zip(encoded, spans, strict=True)]
    shape = (len(layers), k, lm.d_model)
    values = torch.empty(len(encoded), *shape) if collect else None
    total = torch.zeros(shape, dtype=torch.float64)
    squares = torch.zeros(shape, dtype=torch.float64)
    reader = _Reader(lm, layers, site)
    done = 0
    for batch in lm.batches(encoded):
        rows = batch.rows.tolist()
        pad = batch.input_ids.shape[1] - batch.attention_mask.sum(1)
        start = pad + torch.tensor([spans[row][0] for row in rows], device=pad.device)
        stop = pad + torch.tensor([spans[row][1] for row in rows], device=pad.device)
        read = reader.read(batch, start, stop, mean_over)
        if values is not None:
            values[rows] = read
        exact = read.double()
        total += exact.sum(0)
        squares += exact.square().sum(0)
        done += len(rows)
        if progress is not None:
            progress(done, len(encoded))
    count = len(encoded)
    return Activations(tuple(layers), site, values, total / count, squares / count, count)


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


class _Reader:
    """Reads one batch at a time."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int], site: str) -> None:
        self.lm = lm
        self.layers = list(layers)
        self.taps = [lm.sites.reading(Site(site, layer)) for layer in layers]

    def read(self, batch: Batch, start: Tensor, stop: Tensor, mean_over: bool) -> Tensor:
        """Read `[batch, layers, positions, d_model]` in the padded columns [start, stop)."""
        found: dict[int, Tensor] = {}
        wanted = set(self.layers)
        columns = torch.arange(batch.input_ids.shape[1], device=start.device)
        inside = (columns >= start[:, None]) & (columns < stop[:, None])
        width = int((stop - start)[0])

        def keep(layer: int, scale: float, hidden: Tensor) -> None:
            chosen = inside.to(hidden.device)
            if mean_over:
                weight = chosen.float() / chosen.sum(1, keepdim=True)
                picked = torch.einsum("bs,bsd->bd", weight, hidden.float()).unsqueeze(1)
            else:
                picked = hidden[chosen].view(hidden.shape[0], width, -1).float()
            found[layer] = picked * scale if scale != 1 else picked
            if len(found) == len(wanted):
                raise _Stop

        with Hooks() as hooks:
            for layer, tap in zip(self.layers, self.taps, strict=True):
                hooks.at(tap, partial(keep, layer, tap.scale))
            try:
                self.lm.forward(batch, logits_to_keep=1)
            except _Stop:
                pass
        return torch.stack([found[layer].cpu() for layer in self.layers], dim=1)
