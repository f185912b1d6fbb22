"""Closing a gap: sort-sum-stop and gradient search beside GCG at equal closure, on the built-in model.

Refusal, mood and topic, both directions. GCG (width 512, top-k 64) lowers the same gap on the same
train prompts with as many tokens as sort-sum-stop used, at least two, until the same share of them
is closed. Baseline `gcg`: prompts fed (candidates times prompts; a gradient counts as three).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from common import emit
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import readout_tokens
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.prompts.discrete.gcg import gcg
from trimtab.prompts.gap.gap_search import METHODS, GapSearch, close_gap
from trimtab.prompts.gap.readings import Reader
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.scoring.objective import GapLoss
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.rows import lay_out
from trimtab.results.journal import Journal

BEHAVIORS = ("refusal", "mood", "topic")
TRAIN, GOAL = 8, 0.9
WIDTH, TOP_K = 512, 64


def described(result: GapSearch) -> dict[str, object]:
    """The figures of one search."""
    held = result.held_out
    assert held is not None and result.null is not None
    return {
        "text": result.text,
        "tokens": len(result.found.slot),
        "train_closed": result.found.closed,
        "held_out_closed": held.closed,
        "held_out_closed_before": held.closed_before,
        "held_out_judged": held.judged,
        "held_out_judged_before": held.judged_before,
        "null_closed": result.null[0],
        "neutral_kl": result.neutral_kl,
        "perplexity": result.perplexity,
        "prompts_fed": result.found.sequences,
        "seconds": result.seconds,
        "true_over_predicted": result.found.additivity,
        "order": result.found.order,
        "reconstruction": result.found.reconstruction,
        "predicted": [step.predicted for step in result.found.steps],
        "true": [step.true for step in result.found.steps],
        "stopped": result.found.stopped,
    }


def by_gcg(
    lm: LanguageModel, name: str, sign: int, slot: str, length: int, steps: int, closed: float
):
    """GCG on the same gap until the same share of the train prompts is closed."""
    behavior = load_behavior(name)
    train = behavior.split(0).train
    side = (train.away if sign > 0 else train.toward)[:TRAIN]
    tokens = readout_tokens(lm, behavior)
    objective = GapLoss(tokens.toward, tokens.away, sign)
    rows = lay_out(lm, [e.prompt for e in side], slot)
    bound = Constraints().bind(lm, rows)
    generator = torch.Generator().manual_seed(0)
    allowed = bound.allowed.nonzero()[:, 0]
    start = allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()
    reader, kernel = Reader(lm, rows, objective), Kernel(lm, rows, objective)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "gcg.jsonl", {"work": "bench"})
        gcg(
            kernel, bound, start, steps=steps, width=WIDTH, top_k=TOP_K,
            generator=generator, journal=journal, run="gcg",
        )  # fmt: skip
        seconds = time.perf_counter() - began
        slots = [tuple(entry["ids"]) for entry in journal.entries if entry.get("ids")]
    shares = ((sign * reader.read(slots).gaps) > 0).double().mean(-1).tolist()
    reached = next((n for n, share in enumerate(shares) if share >= closed), None)
    used = len(slots) if reached is None else reached + 1
    return {
        "steps": used,
        "reached": reached is not None,
        "train_closed": shares[used - 1],
        "prompts_fed": used * (WIDTH + 3) * len(rows),
        "seconds": seconds * used / len(slots),
        "counts_of_all_steps": vars(kernel.counts),
    }


def main() -> None:
    """Run every behavior, direction and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behaviors", default=",".join(BEHAVIORS))
    parser.add_argument("--slot", default="suffix")
    parser.add_argument("--gcg-steps", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    lm = load("harbor", dtype=torch.float32)
    results: list[dict[str, object]] = []
    for name in options.behaviors.split(","):
        for sign in (1, -1):
            entry: dict[str, object] = {"behavior": name, "sign": sign, "slot": options.slot}
            for method in METHODS:
                try:
                    result = close_gap(
                        lm, load_behavior(name), method=method,
                        direction="toward" if sign > 0 else "away", slot=options.slot,
                        train_prompts=TRAIN, max_prompts=40, nulls=5, goal=GOAL,
                    )  # fmt: skip
                except TrimtabError as error:
                    entry[method] = {"refused": error.found}
                    continue
                entry[method] = described(result)
                if method == "sort":
                    length = max(2, len(result.found.slot))
                    closed = result.found.closed
                    against = by_gcg(
                        lm, name, sign, options.slot, length, options.gcg_steps, closed
                    )
                    entry["gcg"] = against
                    fed = against["prompts_fed"]
                    assert isinstance(fed, int)
                    entry["sort_over_gcg"] = result.found.sequences / fed
            results.append(entry)
    emit("gap_search", results, options.json)


if __name__ == "__main__":
    main()
