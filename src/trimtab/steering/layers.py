"""Which layers are steered when nobody says: the middle of the network and beyond."""

from __future__ import annotations


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Return the 0-based layers whose output lies at 40 % to 90 % of the depth.

    The output of layer l of an L-layer model is at depth (l + 1) / L. The range is the default of
    the norm-calibrated strength convention; a model too shallow for it is steered at its middle
    layer.

    Args:
        n_layers: depth L, at least 1.
    """
    first = -(-4 * n_layers // 10)  # whole numbers: 0.9 * 10 must not become 8.999...
    last = 9 * n_layers // 10
    return tuple(depth - 1 for depth in range(first, last + 1)) or ((n_layers - 1) // 2,)
