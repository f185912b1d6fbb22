"""A vector with few dimensions: keep those that carry the effect, set the others to zero.

Source: section 5 of arXiv 2604.08524 (docs/methods/sparsify.md says where its code differs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case
from trimtab.mechanism.sparse.dimensions import (
    STEPS,
    Effects,
    changes,
    dimension_effects,
    dimension_scores,
    kept_dimensions,
)
from trimtab.results import Progress
from trimtab.steering.vector import VectorSteering


def sparsify(
    case: Case,
    keep: float = 0.1,
    order: str = "attribution",
    restore_norm: bool = True,
    *,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> VectorSteering:
    """Return a case's vector with only the dimensions that carry its effect on the train split.

    Args:
        case: of a vector at the strength it is used at; its signs are the directions that count.
        keep: share of the dimensions, those of all active layers pooled.
        order: what keeps a dimension, see `dimension_scores`.
        restore_norm: lengthen the rest to the dense vector's length, one factor for all layers.
        steps: of the integral.
        progress: called with (passes done, passes in all).

    Returns:
        A plain vector at the same strength; its provenance has the record under `sparsified`.

    Raises:
        TrimtabError: a vector that does not add, or that changes no greedy token at its strength; a
            share outside (0, 1]; an unknown order.
    """
    vector = case.vector
    effects: Effects = {layer: torch.zeros(case.lm.d_model) for layer in changes(vector)}
    if order not in ("magnitude", "random"):
        runs = list(case.runs(case.splits.train).values())
        effects = dimension_effects(case.lm, runs, steps, progress)
    kept = kept_dimensions(dimension_scores(vector, effects, order, case.seed), keep)
    note = {
        "keep": keep,
        "order": order,
        "split": "train",
        "signs": list(case.signs),
        "steps": steps,
    }
    return masked(vector, kept, restore_norm, note)


def masked(
    vector: VectorSteering,
    kept: Mapping[int, Tensor],
    restore_norm: bool = True,
    note: Mapping[str, object] | None = None,
) -> VectorSteering:
    """Return the vector with all but the kept dimensions at zero.

    Layers of which nothing is kept are no longer steered. To restore the norm is to multiply by the
    ratio of lengths, dense over sparse, layers pooled. `note` is what else the provenance should say.
    """
    dense = {layer: vector.directions[layer].double() for layer in vector.layers}
    sparse = {layer: c * kept[layer] for layer, c in dense.items()}
    sparse = {layer: c for layer, c in sparse.items() if float(c.norm()) > 0}
    if not sparse:
        raise TrimtabError(
            asked=f"a sparse form of {vector.label}",
            found="no dimension kept that the vector moves",
            advice="keep a larger share",
        )
    before, after = (
        math.sqrt(sum((vector.scales[layer] * float(c.norm())) ** 2 for layer, c in each.items()))
        for each in (dense, sparse)
    )
    factor = before / after if restore_norm else 1.0
    record = {
        **(note or {}),
        "restore_norm": restore_norm,
        "dimensions": {str(layer): int(kept[layer].sum()) for layer in dense},
        "cosine": after / before,
    }
    plain = vector.at(vector.strength)  # a tuned vector would carry a report about the dense one
    return replace(
        plain,
        directions={layer: (c / c.norm()).float() for layer, c in sparse.items()},
        layers=tuple(sparse),
        scales={
            layer: factor * plain.scales[layer] * float(c.norm() / dense[layer].norm())
            for layer, c in sparse.items()
        },
        targets={},
        norms={layer: mu for layer, mu in plain.norms.items() if layer in sparse},
        # They were measured along the dense direction.
        class_gaps={},
        spreads={},
        provenance={**plain.provenance, "sparsified": record},
    )
