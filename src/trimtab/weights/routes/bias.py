"""The bias route: where nothing stands between a module and the stream, its bias is a constant of it.

In a pre-norm block, resid_post = resid_mid + r (W x + b): adding alpha c / r to the bias b of the
MLP's output projection adds alpha c to the block's output, and the same bias of the attention adds
it to resid_mid. r is 1, or Granite's residual multiplier. Behind a post-norm it would not be alpha
c.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.layout import Layout
from trimtab.weights.routes.changes import Point


def bias_of(layout: Layout, point: Point) -> str | None:
    """Return the bias that adds a constant at a point, or None where there is none."""
    return {"mid": layout.mid_bias, "post": layout.post_bias}.get(point[0])


def add_bias(draft: Draft, point: Point, constant: Tensor) -> None:
    """Add a constant of the stream, float64 `[d_model]`, to a bias.

    A bias already there is added to, in float64, and rounded once to the dtype of the weights.
    """
    kind, layer = point
    name = bias_of(draft.layout, point)
    assert name is not None  # the planner chose this route because there is one
    draft.ensure_bias(name)
    block = draft.block_of(layer, "attention" if kind == "mid" else "mlp")
    multiplier = draft.layout.residual_multiplier
    draft.shift_bias(block, name, constant / multiplier, f"{name} of block {layer}")
    draft.steps.append(f"add the constant to {name} of block {layer}")
