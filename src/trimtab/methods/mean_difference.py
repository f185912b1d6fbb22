"""The difference of means: v_l = mean h_l(toward) - mean h_l(away)."""

from __future__ import annotations

from trimtab.methods.contrast import SAME, read_contrast
from trimtab.methods.registry import Found, Task, register


@register("mean_difference", aliases=("caa", "dim", "difference_in_means"))
def mean_difference(task: Task) -> Found:
    """Find mean(toward) - mean(away) at each layer, in float64.

    Source: contrastive activation addition (Rimsky et al., 2023) and the difference in means of
    Arditi et al., 2024.
    """
    contrast = read_contrast(task)
    vectors = {layer: contrast.difference(layer) for layer in contrast.telling}
    # A mean difference of rounding size is noise even where single activations differ.
    length = {layer: contrast.toward[layer].norm(dim=1).mean() for layer in vectors}
    return contrast.found(
        {layer: v for layer, v in vectors.items() if bool(v.norm() > SAME * length[layer])}
    )
