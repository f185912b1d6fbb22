"""A vector with few dimensions: keep those that carry the effect, set the others to zero.

Source: section 5 of arXiv 2604.08524 (docs/methods/sparsify.md says where its code differs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.teacher_forced import four_sets
from trimtab.mechanism.sparse.dimensions import (
    STEPS,
    Effects,
    changes,
    dimension_effects,
    dimension_scores,
    kept_dimensions,
)
from trimtab.models.model import LanguageModel
from trimtab.results import Progress
from trimtab.steering.vector import VectorSteering


def effects_of(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    signs: Sequence[int] = (1, -1),
    steps: int = STEPS,
    max_prompts: int = 16,
    max_new_tokens: int = 24,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Return the dimensions' effects of a vector at +-|m| on the four sets of a split.

    Raises:
        TrimtabError: a vector that does not add, or that changes no greedy token.
    """
    changes(vector)
    runs = four_sets(
        lm, behavior, vector, max_prompts=max_prompts, max_new_tokens=max_new_tokens, signs=signs
    )
    return dimension_effects(lm, list(runs.values()), steps, progress)


def sparsify(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    keep: float = 0.1,
    order: str = "attribution",
    restore_norm: bool = True,
    *,
    split: str | None = "train",
    signs: Sequence[int] = (1, -1),
    steps: int = STEPS,
    max_prompts: int = 16,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> VectorSteering:
    """Return the vector with only the dimensions that carry its effect.

    Args:
        lm: the unsteered model.
        behavior: what the vector is for.
        vector: at the strength it is used at; its effect is read there.
        keep: share of the dimensions, those of all active layers pooled.
        order: what keeps a dimension, see `dimension_scores`.
        restore_norm: lengthen the rest to the dense vector's length, one factor for all layers.
        split: of the behavior that effects are read on; None for all of it.
        signs: the directions whose effects count.
        steps: of the integral.
        max_prompts: at most so many a direction.
        max_new_tokens: length of a response.
        seed: of the split, and of the order `random`.
        progress: called with (passes done, passes in all).

    Returns:
        A plain vector at the same strength; its provenance has the record under `sparsified`.

    Raises:
        TrimtabError: a vector that does not add, or that changes no greedy token at its strength; a
            share outside (0, 1]; an unknown order.
    """
    part = behavior if split is None else behavior.split(seed).named(split)
    effects: Effects = {layer: torch.zeros(lm.d_model) for layer in changes(vector)}
    if order not in ("magnitude", "random"):
        effects = effects_of(
            lm, part, vector, signs=signs, steps=steps, max_prompts=max_prompts,
            max_new_tokens=max_new_tokens, progress=progress,
        )  # fmt: skip
    kept = kept_dimensions(dimension_scores(vector, effects, order, seed), keep)
    note = {"keep": keep, "order": order, "split": split, "signs": list(signs), "steps": steps}
    return masked(vector, kept, restore_norm, note)


def masked(
    vector: VectorSteering,
    kept: Mapping[int, Tensor],
    restore_norm: bool = True,
    note: Mapping[str, object] | None = None,
) -> VectorSteering:
    """Return the vector with all but the kept dimensions at zero.

    Args:
        vector: the dense one; layers of which nothing is kept are no longer steered.
        kept: active layer -> bool `[d_model]`.
        restore_norm: multiply by the ratio of lengths, dense over sparse, layers pooled.
        note: what else the provenance should say.

    Raises:
        TrimtabError: nothing left.
    """
    changes(vector)
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
