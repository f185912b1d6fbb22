"""Two lanes of one batch: the same tokens unsteered and steered, continued together.

At each step the steered lane's greedy token is fed to both lanes, so the base lane says at every
position what the model does unsteered on the very text that the steered run writes. With a part of
the steered lane held at the base lane's (holding.py) this is a frozen run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.mechanism.frozen.holding import holding
from trimtab.models import generation
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.replay import KeptCache
from trimtab.passes.greedy import collect, greedy
from trimtab.passes.sharing import spread
from trimtab.steering.vector import VectorSteering

LANES = (0.0, 1.0)  # how much of the steering each lane gets
TOKENS_PER_BATCH = 4096  # of a lane


@torch.no_grad()
def lane_answers(
    lm: LanguageModel,
    vector: VectorSteering,
    prompts: Sequence[Prompt],
    holds: Sequence[str] = (),
    *,
    max_new_tokens: int = 40,
    factors: tuple[float, float] = LANES,
    null_seed: int | None = None,
    use_cache: bool = True,
) -> list[str]:
    """Answer prompts greedily in the second lane; without a hold, as `lm.generate` does steered.

    Vector, holds and null are those of `holding`; `factors` are of the base and of the steered lane.
    """
    encoded = [lm.encode(prompt) for prompt in prompts]
    for item in encoded:
        lm.check_length(len(item.ids) + max_new_tokens)
    stops = generation.end_ids(lm)
    answers = [""] * len(encoded)
    for batch in lm.batches(encoded, max_tokens=TOKENS_PER_BATCH):
        both = spread(batch, 2)
        each = torch.tensor(factors).repeat_interleave(len(batch.rows))
        with holding(lm, vector, holds, each, null_seed):
            steps = greedy(lm, both, KeptCache() if use_cache else None, stops, lanes=2)
            found = collect(steps, len(batch.rows), max_new_tokens)
        for place, ids in zip(batch.rows.tolist(), found, strict=True):
            answers[place] = generation.decode(lm.tokenizer, ids, stops)
    return answers
