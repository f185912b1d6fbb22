"""Whether different methods find the same thing: the dimensions that their vectors share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from trimtab.errors import TrimtabError
from trimtab.mechanism.sparse.dimensions import Effects, kept_dimensions

PERMUTATIONS = 2000


@dataclass(frozen=True)
class Pair:
    """Two sets of surviving dimensions.

    Attributes:
        first: a name; `second`: the other's.
        iou: intersection over union.
        expected: mean IoU of permuted dimensions; `high` their 95th percentile.
        p: share of permutations with at least this IoU, the observed one counted in.
    """

    first: str
    second: str
    iou: float
    expected: float
    high: float
    p: float


def dimension_overlap(
    scores: Mapping[str, Effects],
    share: float = 0.1,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Pair]:
    """Compare the dimensions that survive in every two vectors, with a permutation test.

    Permuting inside each layer keeps how many of a layer's dimensions survive. The test asks whether
    dimensions are shared, not why: a model in which few dimensions matter to any direction shares
    them among all, so put a random direction beside the methods.

    Args:
        scores: name -> layer -> score `[d_model]`, see `dimension_scores`.
        share: of the dimensions that survive, all layers pooled.
        permutations: of the null.
        seed: of the permutations.

    Raises:
        TrimtabError: fewer than two vectors, other layers or widths, or no permutation.
    """
    shapes = {name: {k: tuple(v.shape) for k, v in each.items()} for name, each in scores.items()}
    if len(scores) < 2 or permutations < 1 or len({str(s) for s in shapes.values()}) != 1:
        raise TrimtabError(
            asked=f"the shared dimensions of {', '.join(scores) or 'nothing'}",
            found="fewer than two vectors, or vectors at other layers",
            advice="find every vector at the same layers (layers=), and permute at least once",
        )
    kept = {name: kept_dimensions(each, share) for name, each in scores.items()}
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for first, second in combinations(kept, 2):
        a, b = kept[first], kept[second]
        sizes = [sum(int(each.sum()) for each in side.values()) for side in (a, b)]
        shared = sum(int((a[layer] & b[layer]).sum()) for layer in a)
        drawn = torch.zeros(permutations)
        for layer in a:
            # A permuted set meets `a` in as many dimensions as that many draws without return do.
            places = torch.rand(permutations, len(b[layer]), generator=generator).argsort(1)
            drawn += a[layer][places[:, : int(b[layer].sum())]].sum(1)
        null = drawn / (sum(sizes) - drawn)
        pairs.append(
            Pair(
                first,
                second,
                iou=shared / (sum(sizes) - shared),
                expected=float(null.mean()),
                high=float(null.quantile(0.95)),
                p=(1 + int((drawn >= shared).sum())) / (1 + permutations),
            )
        )
    return pairs
