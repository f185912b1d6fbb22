"""Slices: two blocks of a model that is too large to load, with everything around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trimtab.steering.weights import Scaled, WeightSteering
from trimtab.weights.disk.checkpoint import open_checkpoint
from trimtab.weights.disk.draft import Draft, finish, start_draft
from trimtab.weights.disk.stream import write


def write_slices(
    draft: Draft, result: Path, vectors: Sequence[Scaled]
) -> tuple[tuple[Path, Path], list[Scaled]]:
    """Cut the first steered block and a neighbor out of the base and out of the result.

    Both go below `.slices` in the result's folder. Returned are their folders, and the steerings of
    the slice of the base.
    """
    depth = int(draft.base.config.num_hidden_layers)
    first = min(layer for vector in vectors for layer in vector.layers)
    first = max(0, min(first, depth - 2))
    kept = list(range(first, min(first + 2, depth)))
    base = start_draft(draft.base)
    after = start_draft(open_checkpoint(result))
    numbers = [n for n, block in enumerate(draft.blocks) if block.origin in kept]
    folders = (result / ".slices" / "base", result / ".slices" / "result")
    for part, folder, chosen in ((base, folders[0], kept), (after, folders[1], numbers)):
        part.blocks = [part.blocks[n] for n in chosen]
        finish(part)
        folder.mkdir(parents=True)
        write(part, folder, link=False)
    return folders, [sliced for v in vectors if (sliced := _moved(v, kept)) is not None]


def _moved(vector: Scaled, kept: list[int]) -> Scaled | None:
    """The steering of the blocks kept, under their new numbers."""
    layers = tuple(kept.index(layer) for layer in vector.layers if layer in kept)
    if isinstance(vector, WeightSteering):
        left, right = (
            {(kind, kept.index(n)): part for (kind, n), part in factors.items() if n in kept}
            for factors in (vector.left, vector.right)
        )
        return replace(vector, left=left, right=right, fingerprint="") if layers else None
    if not layers or (vector.site == "embed" and 0 not in kept):
        return None

    renumbered = {
        name: {kept.index(n): value for n, value in getattr(vector, name).items() if n in kept}
        for name in ("directions", "scales", "targets", "norms", "class_gaps", "spreads")
    }
    return replace(vector, **renumbered, layers=layers, fingerprint="", n_layers=len(kept))
