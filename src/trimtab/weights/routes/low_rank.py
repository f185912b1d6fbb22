"""Projections as low-rank updates of what writes to the stream.

A sublayer of a pre-norm block adds r (W x + b0). Its hook makes A r (W x + b0) + b of that, with
A = I - U V^T from one or several directions, so W becomes A W = W - U (V^T W), b0 becomes A b0, and
b stays as a constant of the stream after that sublayer, which goes its own route. Ablation of a
unit direction c by a share m is U = m c, V = c, b = 0; ACE (affine) has b = m t c. Behind a
post-norm the norm's divisor depends on what is removed, so there it is no change of W.
"""

from __future__ import annotations

import re
from dataclasses import replace

from trimtab.errors import TrimtabError
from trimtab.steering.vector import VectorSteering
from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.sources import Copy, Projected, Zeros, value_of
from trimtab.weights.routes.changes import Affine, Writer


def project_writer(draft: Draft, writer: Writer, map_: Affine) -> None:
    """Apply A to every weight and bias with which a sublayer writes; b is left to the caller."""
    kind, layer = writer
    if not map_.left.shape[1]:
        return
    layout = draft.layout
    block = draft.block_of(layer, kind)
    pattern = re.escape(layout.attention_writer) if kind == "attention" else layout.mlp_writer
    names = [name for name in block.tensors if re.fullmatch(pattern, name)]
    assert names, (pattern, sorted(block.tensors))  # the draft checked the tensors' names
    for name in names:
        base = block.tensors[name]
        assert isinstance(base, Copy)  # projections come before everything that computes
        block.tensors[name] = Projected(base, map_.left, map_.right, layout.writes_rows)
        bias = name.removesuffix("weight") + "bias"
        if bias in block.tensors and not isinstance(block.tensors[bias], Zeros):
            old = block.tensors[bias]
            before = value_of(old).double()
            meant = before - map_.left @ (map_.right.T @ before)
            block.tensors[bias] = draft.value(meant, old, f"{bias} of block {layer}")
    rank = map_.left.shape[1]
    draft.steps.append(f"rank-{rank} update of {_listed(names)} of block {layer}")


def at_every_writer(
    vector: VectorSteering, layer: int | None = None
) -> tuple[VectorSteering, VectorSteering, VectorSteering]:
    """Return the steerings that ablate one direction wherever the network writes to its stream.

    They are a projection at `embed`, at `attn_out` and at `mlp_out` of every layer. At m = 1 no
    vector along the direction ever enters the stream, the same as a projection at every point of
    it. For models whose attention and MLP run side by side as well.

    Args:
        vector: holds the direction; its operation becomes `ablate` unless it is `affine`.
        layer: whose direction is used; the vector's only active layer by default.

    Raises:
        TrimtabError: several layers are active and none is named, or there is no such direction.
    """
    chosen = layer if layer is not None else vector.layers[0] if len(vector.layers) == 1 else None
    if chosen is None or chosen not in vector.directions:
        raise TrimtabError(
            asked="one direction for every writer of the stream",
            found=f"directions for the layers {sorted(vector.directions)}",
            advice="name the layer whose direction is to be used",
        )
    c, target = vector.directions[chosen], vector.targets.get(chosen, 0.0)
    operation = vector.operation if vector.operation != "add" else "ablate"
    everywhere = range(vector.n_layers)
    both = replace(
        vector,
        directions=dict.fromkeys(everywhere, c),
        layers=tuple(everywhere),
        scales=dict.fromkeys(everywhere, vector.scales.get(chosen, 1.0)),
        targets=dict.fromkeys(everywhere, target) if target else {},
        norms={},
        class_gaps={},
        spreads={},
        operation=operation,
    )
    return (
        both.select(site="embed", layers=(0,)),
        both.select(site="attn_out"),
        both.select(site="mlp_out"),
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
