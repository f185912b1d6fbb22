"""Low-rank updates of what writes to the stream: those of a weights lever, and projections.

A sublayer of a pre-norm block adds r (W x + b0). Its hook makes A r (W x + b0) + b of that, with
A = I - U V^T from one or several directions, so W becomes A W = W - U (V^T W), b0 becomes A b0, and
b stays as a constant of the stream after that sublayer, which goes its own route. Ablation of a
unit direction c by a share m is U = m c, V = c, b = 0; ACE (affine) has b = m t c. After a
post-norm the norm's divisor depends on what is removed, so there it is no change of W. A weights
lever is W + m B C before any projection, so that A W + A m B C is written; no norm matters to it.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from trimtab.errors import TrimtabError
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.weights.disk.draft import Block, Draft
from trimtab.weights.disk.sources import Copy, ProjectedSource, TensorSource, Zeros, value_of
from trimtab.weights.routes.changes import Affine, Writer


def project_embedding(draft: Draft, map_: Affine) -> None:
    """Make A x + b of the stream x = s e + p that enters block 0, e and p rows of embeddings.

    s is the model's embedding scale: s e becomes s (A e + b / s). Learned position embeddings p
    take the constant, so that the tokens' own embedding may stay tied where only b changes.
    """
    layout = draft.layout
    rank = map_.left.shape[1]
    if layout.positions is not None:
        old = _copy(draft.outer[layout.positions])
        draft.outer[layout.positions] = ProjectedSource(old, map_.left, map_.right, False, map_.shift)
        if not rank:
            draft.steps.append("add the constant to every position embedding")
            return
    shift = None if layout.positions is not None else map_.shift / layout.embed_scale
    draft.untie()
    old = _copy(draft.outer[layout.embedding])
    draft.outer[layout.embedding] = ProjectedSource(old, map_.left, map_.right, False, shift)
    said = f"rank-{rank} update of" if rank else "add the constant to"
    draft.steps.append(f"{said} every token embedding")


def project_writer(draft: Draft, writer: Writer, map_: Affine) -> None:
    """Apply A to every weight and bias with which a sublayer writes; b is left to the caller."""
    rank = map_.left.shape[1]
    if not rank:
        return
    block, names = _writing(draft, writer)
    for name in names:
        base = _copy(block.tensors[name])
        block.tensors[name] = ProjectedSource(base, map_.left, map_.right, draft.layout.writes_rows)
        bias = name.removesuffix("weight") + "bias"
        if bias in block.tensors and not isinstance(block.tensors[bias], Zeros):
            old = block.tensors[bias]
            before = value_of(old).double()
            meant = before - map_.left @ (map_.right.T @ before)
            block.tensors[bias] = draft.value(meant, old, f"{bias} of block {writer[1]}")
    said = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
    draft.steps.append(f"rank-{rank} update of {said} of block {writer[1]}")


def update_writers(draft: Draft, lever: WeightSteering) -> None:
    """Add m B C to the matrices that a weights lever names, after which their projections stand.

    Raises:
        TrimtabError: a sublayer with several output projections, or factors of other shapes.
    """
    for writer, left in lever.left.items():
        kind, layer = writer
        fits = layer < int(draft.base.config.num_hidden_layers)
        block, names = _writing(draft, writer) if fits else (None, [])
        mine = (left.shape[0], lever.right[writer].shape[1])
        there = block.tensors[names[0]].shape if block is not None else ()
        there = there if draft.layout.writes_rows else there[::-1]
        if block is None or len(names) != 1 or there != mine:
            raise TrimtabError(
                asked=f"to bake {lever.label} into the {kind} writer of layer {layer} of "
                f"{draft.layout.architecture}",
                found=f"factors for {list(mine)}, {len(names)} matrices of {list(there)} there",
                advice="bake it into the model it was made for",
            )
        old = block.tensors[names[0]]
        b, c = lever.strength * left.double(), lever.right[writer].double()
        if isinstance(old, Copy):
            same = Affine.identity(mine[0])
            old = ProjectedSource(old, same.left, same.right, draft.layout.writes_rows)
        assert isinstance(old, ProjectedSource)  # the two things that a writer's weight can be here
        b = b - old.left @ (old.right.T @ b)
        if old.plus is not None:
            b, c = torch.cat([old.plus[0], b], dim=1), torch.cat([old.plus[1], c])
        block.tensors[names[0]] = replace(old, plus=(b, c))
        rank = left.shape[1]
        draft.steps.append(f"add a rank-{rank} matrix to {names[0]} of block {layer}")


def _writing(draft: Draft, writer: Writer) -> tuple[Block, list[str]]:
    """The block of a sublayer, and the names of the weights with which it writes."""
    kind, layer = writer
    block, layout = draft.block_of(layer, kind), draft.layout
    pattern = re.escape(layout.attention_writer) if kind == "attention" else layout.mlp_writer
    names = [name for name in block.tensors if re.fullmatch(pattern, name)]
    assert names, (pattern, sorted(block.tensors))  # the draft checked the tensors' names
    return block, names


def _copy(source: TensorSource) -> Copy:
    assert isinstance(source, Copy)  # projections come before everything that computes
    return source


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
