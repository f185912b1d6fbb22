"""What a sweep over strengths costs, and how much of it steering makes necessary.

Two sweeps of the built-in model in float32, each against two baselines. `plain_loop`: strength by
strength and prompt by prompt, as a notebook does. `batched_loop`: strength by strength, all prompts
in one batch. Baselines get their prompts tokenized beforehand. That the results are equal is
checked: logits to a tolerance, generated texts to the letter.

`flops_over_baseline` counts the matrix products that were made. `changed_share` says how much could
be saved by sharing between the strengths of one prompt alone: of all tokens times blocks, the share
at or behind the first steered token and above the first steered block. A fan stays below it where
prompts begin alike, and because the last block is run to the end for the read position only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import trimtab as tt
from common import arguments, compared, emit, interleaved
from trimtab.models.model import Batch, LanguageModel
from trimtab.passes.fan import Fan
from trimtab.passes.rollout import rollout
from trimtab.passes.sharing import first_steered, shared_depth
from trimtab.steering.vector import VectorSteering

PLAIN, BATCHED = "plain_loop", "batched_loop"
LEVERS = ((1, "all"), (4, "all"), (4, "last"), (4, "post_instruction"))
READOUT_STRENGTHS = [round(-2 + 0.2 * i, 1) for i in range(21)]
READOUT_PROMPTS = 64
TEXT_STRENGTHS = [round(-2 + 0.5 * i, 1) for i in range(9)]
TEXT_LEVERS = ((4, "all"), (4, "post_instruction"))
TEXT_PROMPTS, NEW_TOKENS = 32, 40
# Largest difference of a logit between two orders of the same float32 sums.
TOLERANCE = 1e-4


@torch.no_grad()
def read_loop(lm: LanguageModel, vector: VectorSteering, batches: Sequence[Batch]) -> Tensor:
    """Next-token logits `[strengths, prompts, vocab]`, one batch and strength at a time."""
    rows = sum(len(batch.rows) for batch in batches)
    result = torch.empty(len(READOUT_STRENGTHS), rows, lm.model.config.vocab_size)
    for place, strength in enumerate(READOUT_STRENGTHS):
        with vector.at(strength).on(lm):
            start = 0
            for batch in batches:
                logits = lm.forward(batch, logits_to_keep=1)[:, -1]
                result[place, start + batch.rows] = logits
                start += len(batch.rows)
    return result


def write_loop(
    lm: LanguageModel, vector: VectorSteering, prompts: Sequence[str], together: bool
) -> list[list[str]]:
    """Greedy answers per strength, prompts in one call or one by one."""
    found = []
    for strength in TEXT_STRENGTHS:
        with vector.at(strength).on(lm):
            if together:
                found.append(lm.generate(list(prompts), max_new_tokens=NEW_TOKENS))
            else:
                found.append([lm.generate(p, max_new_tokens=NEW_TOKENS) for p in prompts])
    return found


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a run gives, and the multiplications and additions of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        found = run()
    return found, counter.get_total_flops()


def timed(
    runs: dict[str, Callable[[], object]], repeats: int, baseline: str
) -> list[dict[str, object]]:
    """Rows of `compared`, with how many times faster than the baseline each run is."""
    rows = compared(interleaved(runs, repeats), baseline)
    for row in rows:
        row["times_faster"] = 1 / float(str(row["time_over_baseline"]))
    return rows


def changed_share(lm: LanguageModel, vector: VectorSteering, prompts: Sequence[str]) -> float:
    """What strengths change, see above."""
    encoded = [lm.encode(prompt) for prompt in prompts]
    behind = sum(len(item.ids) - first_steered(vector, item) for item in encoded)
    above = lm.n_layers - 1 - shared_depth(vector)
    return behind * above / (sum(len(item.ids) for item in encoded) * lm.n_layers)


def main() -> None:
    """Time both sweeps for every lever."""
    options = arguments(__doc__ or "", repeats=5)
    lm = tt.load("harbor", dtype=torch.float32)
    behavior = tt.behavior("refusal")
    found = tt.find(lm, behavior)
    prompts = [str(example.prompt) for example in behavior.away[:READOUT_PROMPTS]]
    encoded = [lm.encode(prompt) for prompt in prompts]
    alone = [batch for item in encoded for batch in lm.batches([item])]
    results: list[dict[str, object]] = []
    for layer, scope in LEVERS:
        vector = found.select(layers=[layer], scope=scope)
        fan = Fan(lm, vector, encoded)
        reads: dict[str, Callable[[], Tensor]] = {
            PLAIN: partial(read_loop, lm, vector, alone),
            BATCHED: partial(read_loop, lm, vector, list(lm.batches(encoded))),
            "fan": partial(fan.next_logits, READOUT_STRENGTHS),
        }
        once = {name: counted(run) for name, run in reads.items()}
        logits = {name: found for name, (found, _) in once.items()}
        worst = float((logits["fan"] - logits[PLAIN]).abs().max())
        if worst > TOLERANCE or fan.reason:
            raise SystemExit(f"logits differ by {worst:.1e} ({fan.plan})")
        results.append(
            {
                "sweep": "readout",
                "model": lm.name,
                "layer": layer,
                "scope": scope,
                "strengths": len(READOUT_STRENGTHS),
                "prompts": len(prompts),
                "baseline": PLAIN,
                "largest_logit_difference": worst,
                "largest_difference_of_baselines": float(
                    (logits[BATCHED] - logits[PLAIN]).abs().max()
                ),
                "changed_share": changed_share(lm, vector, prompts),
                "flops_over_baseline": {
                    name: work / once[PLAIN][1] for name, (_, work) in once.items()
                },
                "plan": fan.plan,
                "runs": timed(dict(reads), options.repeats, PLAIN),
            }
        )
    some = prompts[:TEXT_PROMPTS]
    for layer, scope in TEXT_LEVERS:
        vector = found.select(layers=[layer], scope=scope)
        writes: dict[str, Callable[[], list[list[str]]]] = {
            PLAIN: partial(write_loop, lm, vector, some, False),
            BATCHED: partial(write_loop, lm, vector, some, True),
            "rollout": partial(
                rollout, lm, vector, some, TEXT_STRENGTHS, max_new_tokens=NEW_TOKENS
            ),
        }
        texts = {name: run() for name, run in writes.items()}
        if not texts["rollout"] == texts[PLAIN] == texts[BATCHED]:
            raise SystemExit("the texts differ")
        results.append(
            {
                "sweep": "generation",
                "model": lm.name,
                "layer": layer,
                "scope": scope,
                "strengths": len(TEXT_STRENGTHS),
                "prompts": len(some),
                "new_tokens_at_most": NEW_TOKENS,
                "baseline": PLAIN,
                "same_text": True,
                "runs": timed(dict(writes), max(1, options.repeats // 3), PLAIN),
            }
        )
    emit("sweep", results, options.json)


if __name__ == "__main__":
    main()
