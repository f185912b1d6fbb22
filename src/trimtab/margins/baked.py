"""What random directions do to the gap, as long as those that a checkpoint has baked in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.margins.compared import AuditParts
from trimtab.margins.gap import read
from trimtab.models.baked import RECORD
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.steering.hooks import OPERATIONS
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.scope import Scope
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering

NULLS = 3


def recorded(record: Mapping[str, Any], base: LanguageModel) -> list[VectorSteering]:
    """Return the steerings of a checkpoint's record, with a stand-in for each direction.

    The record has no directions, which a null does not need. Nothing is returned where it is of
    another model than `base`, or of a low-rank update, whose null needs factors that it lacks.
    """
    if record.get("base_fingerprint") not in ("", base.fingerprint):
        return []
    stand_in = torch.eye(1, base.d_model)[0]
    try:
        if any(one["operation"] not in OPERATIONS for one in record.get("steerings", ())):
            return []
        return [
            VectorSteering(
                directions={int(layer): stand_in for layer in one["alphas"]},
                layers=tuple(map(int, one["alphas"])),
                scales={int(k): v / (one["strength"] or 1.0) for k, v in one["alphas"].items()},
                strength=one["strength"],
                site=one["site"],
                operation=one["operation"],
                scope=Scope.parse(one["scope"]),
                targets={int(k): v for k, v in one["targets"].items()},
                provenance={k: one[k] for k in ("behavior", "data_hash", "split", "seed")},
                n_layers=base.n_layers,
                d_model=base.d_model,
            )
            for one in record.get("steerings", ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrimtabError(
            asked="the random control of what a checkpoint has baked in",
            found=f"a record ({RECORD}) that does not say it all: {error!r}",
            advice="bake it again, or move the record away to audit without a random control",
        ) from error


def null_changes(
    lm: LanguageModel,
    before: AuditParts,
    encoded: Mapping[str, Sequence[Encoded]],
    vectors: Sequence[VectorSteering],
    seed: int,
) -> dict[str, float]:
    """Return the mean change of the gap, nats, by list of prompts, over `NULLS` random draws.

    `before` was read of `lm`, which is without the vectors, on the same prompts; the vectors' random
    counterparts are switched on together.
    """
    gap = before.gap
    moved = dict.fromkeys(encoded, 0.0)
    for null_seed in null_seeds(seed, NULLS):
        nulls = [random_null(v, null_seed + 101 * number) for number, v in enumerate(vectors)]
        with Together(tuple(nulls)).on(lm):
            for side, prompts in encoded.items():
                after = read(lm, before.resolution.tokens, prompts).gaps[gap.aggregator]
                moved[side] += (float(after.mean()) - gap.sides[side].gap.mean) / NULLS
    return moved


def held_out(vectors: Sequence[VectorSteering], behavior: Behavior, seed: int) -> bool | None:
    """Tell from what the vectors record whether the test part is new to them; None if they do not."""
    same = {"data_hash": behavior.data_hash, "seed": seed}.items()
    answers = [
        made.get("split") in ("train", "validation") if same <= made.items() else None
        for made in (vector.provenance for vector in vectors)
    ]
    return False if False in answers else None if None in answers else True
