"""The embedding shift: a constant, or a projection, of the stream that enters block 0."""

from __future__ import annotations

from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.sources import Copy, Projected
from trimtab.weights.routes.changes import Affine


def project_embedding(draft: Draft, map_: Affine) -> None:
    """Make A x + b of the stream x = s e + p that enters block 0, e and p rows of embeddings.

    s is the model's embedding scale: s e becomes s (A e + b / s). Learned position embeddings p
    take the constant, so that the tokens' own embedding may stay tied where only b changes.
    """
    layout = draft.layout
    rank = map_.left.shape[1]
    if layout.positions is not None:
        old = _whole(draft, layout.positions)
        draft.outer[layout.positions] = Projected(old, map_.left, map_.right, False, map_.shift)
        if not rank:
            draft.steps.append("add the constant to every position embedding")
            return
    shift = None if layout.positions is not None else map_.shift / layout.embed_scale
    draft.untie()
    old = _whole(draft, layout.embedding)
    draft.outer[layout.embedding] = Projected(old, map_.left, map_.right, False, shift)
    said = f"rank-{rank} update of" if rank else "add the constant to"
    draft.steps.append(f"{said} every token embedding")


def _whole(draft: Draft, name: str) -> Copy:
    found = draft.outer[name]
    assert isinstance(found, Copy)
    return found
