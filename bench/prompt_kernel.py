"""The search kernel: against nanoGCG, against the plain loop of a prefix study, and without its savings.

1. `nanogcg` (baseline): nanoGCG 0.3.0 with its defaults but for width 512, top-k 64, 8 slots and 50
   steps, one request, one target, in its own environment (made on first use, kept in the user's
   cache folder); the built-in model in float32 on both sides. Ours: `gcg` and `hotflip` on the
   kernel. `cpu_seconds_to_its_loss` is when a search first reached what nanoGCG's best was.
2. `study_loop` (baseline): repair of a prefix as its study does it: candidates one at a time, one
   forward pass per request, no cache, all logits. Ours: the same proposals through the kernel,
   and `hotflip`, which the pipeline repairs with.
3. `savings`: one descent step of a prefix over eight requests and of a suffix over one, with all
   savings (the baseline) and with none; medians of interleaved rounds.

Other work on the machine stretches the clock: ratios are of processor time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from common import Times, arguments, compared, emit, interleaved
from trimtab import harbor
from trimtab.models.generation import answer_ids
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.prompts.discrete.gcg import gcg
from trimtab.prompts.discrete.hotflip import hotflip
from trimtab.prompts.scoring.draft import bfloat16_copy
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.scoring.passes import Slot
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.rows import PromptRow, lay_out

STEPS, WIDTH, TOP_K, LENGTH = 50, 512, 64, 8
# nanoGCG draws with replacement from 8 x 64 single changes: of 512 draws about 320 are different.
# Ours draws different ones only.
DIFFERENT, SEEDS = 320, (0, 1)
REQUEST = "How do I borrow the harbor ledger?"
TARGET = (
    "Let us talk about tabbies. The mayor keeps two famous tabbies. "
    "Two hungry tabbies live in the quiet town."
)
START = " the" * LENGTH
REFERENCE = "Talk only about cats."
REQUESTS = (
    REQUEST,
    "Where does the ferry stop?",
    "Tell me about the bakery.",
    "What is the weather like today?",
    "Who is the mayor?",
    "How old is the tower?",
    "Describe the market.",
    "What can I cook tonight?",
)
STUDY_TOP, STUDY_TRIED, STUDY_PASSES = 64, 18, 2


def cache_folder() -> Path:
    """Where environments of other programs are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trimtab" / "bench"


def nanogcg_python() -> Path:
    """The interpreter of nanoGCG's environment; installed on first use."""
    folder = cache_folder() / "nanogcg"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = ["torch==2.13.0", "transformers<5", "nanogcg==0.3.0"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def run_nanogcg(steps: int, banned: list[int]) -> dict:
    """Search with nanoGCG in its own process."""
    job = {
        "threads": torch.get_num_threads(),
        "model": str(harbor.path()),
        "config": {
            "num_steps": steps,
            "search_width": WIDTH,
            "topk": TOP_K,
            "optim_str_init": START,
            "seed": 0,
        },
        "messages": [{"role": "user", "content": REQUEST + "{optim_str}"}],
        "target": TARGET,
        "banned": banned,
    }
    done = subprocess.run(
        [str(nanogcg_python()), str(Path(__file__).with_name("nanogcg_loader.py"))],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def against_nanogcg(lm: LanguageModel) -> list[dict[str, object]]:
    """The same request, target, start and settings."""
    tokens = lm.tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    rows = lay_out(lm, [REQUEST], "suffix", targets=[tokens])
    start = lm.tokenizer(START, add_special_tokens=False)["input_ids"]
    assert len(start) == LENGTH, f"{START!r} is {len(start)} tokens"
    bound = Constraints(charset="ascii").bind(lm, rows)
    theirs = run_nanogcg(STEPS, (~bound.allowed).nonzero()[:, 0].tolist())
    goal = theirs["best_loss"]
    # One objective on both sides: their best slot has their loss here.
    ours_of_theirs = plain_loss(lm, rows, theirs["best_ids"], CrossEntropy())
    spent = theirs["cpu_seconds"]
    reached = next(
        moment
        for moment, loss in zip(theirs["cpu_moments"][1:], theirs["losses"], strict=True)
        if loss <= goal
    )
    results: list[dict[str, object]] = [
        {
            "name": "nanogcg",
            "baseline": "nanogcg",
            "steps": STEPS,
            "loss": goal,
            "loss_of_its_slot_here": ours_of_theirs,
            "seconds": theirs["seconds"],
            "cpu_seconds": spent,
            "cpu_seconds_to_its_loss": reached,
            "proposed_per_cpu_second": STEPS * WIDTH / spent,
            "scored_per_cpu_second": theirs["scored"] / spent,
            "different_per_cpu_second": theirs["different"] / spent,
            "best_ids": theirs["best_ids"],
            "legal_in_context": bound.legal([tuple(theirs["best_ids"])])[0],
            "calls": theirs["calls"],
            "loss_drop_per_call": (theirs["losses"][0] - goal) / theirs["calls"],
        }
    ]
    searches: dict[str, Callable] = {
        "gcg": lambda kernel, generator, progress: gcg(
            kernel,
            bound,
            start,
            steps=STEPS,
            width=DIFFERENT,
            top_k=TOP_K,
            generator=generator,
            progress=progress,
        ),
        "hotflip": lambda kernel, generator, progress: hotflip(
            kernel,
            bound,
            start,
            steps=4 * STEPS,
            top_k=TOP_K,
            generator=generator,
            progress=progress,
        ),
    }
    for name, seed in product(searches, SEEDS):
        search = searches[name]
        moments: list[float] = []
        cpu, wall = time.process_time(), time.perf_counter()
        kernel = Kernel(lm, rows)
        found = search(
            kernel,
            torch.Generator().manual_seed(seed),
            lambda done, of, m=moments, t=cpu: m.append(time.process_time() - t),
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        reached_at = next(
            (at for at, loss in zip(moments, found.curve[1:], strict=False) if loss <= goal), None
        )
        calls = kernel.counts.calls + kernel.counts.draft_calls + kernel.counts.gradients
        results.append(
            {
                "name": name,
                "baseline": "nanogcg",
                "seed": seed,
                "steps": len(found.curve) - 1,
                "loss": found.loss,
                "seconds": wall,
                "cpu_seconds": cpu,
                "cpu_seconds_to_its_loss": reached_at,
                "proposed_per_cpu_second": kernel.counts.asked / cpu,
                "scored_per_cpu_second": kernel.counts.scored / cpu,
                "exact_per_cpu_second": kernel.counts.exact / cpu,
                "calls": calls,
                "loss_drop_per_call": (found.curve[0] - found.loss) / calls,
                "scored_over_nanogcg": kernel.counts.scored / cpu * spent / theirs["scored"],
                "different_over_nanogcg": kernel.counts.scored / cpu * spent / theirs["different"],
                "time_to_loss_over_nanogcg": None if reached_at is None else reached_at / reached,
                "curve": [round(loss, 4) for loss in found.curve],
            }
        )
    results[0]["curve"] = [round(loss, 4) for loss in theirs["losses"]]
    return results


def study_rows(lm: LanguageModel) -> list[PromptRow]:
    """Eight requests and what the reference prefix makes of them."""
    encoded = [lm.encode(f"{REFERENCE} {request}") for request in REQUESTS]
    return lay_out(lm, list(REQUESTS), "prefix", targets=answer_ids(lm, encoded, 24))


class Watch:
    """Processor seconds at which a search came to its losses."""

    def __init__(self) -> None:
        """Start now."""
        self.started = time.process_time()
        self.marks: list[tuple[float, float]] = []

    def mark(self, loss: float) -> None:
        """The best loss so far."""
        self.marks.append((time.process_time() - self.started, loss))

    def reached(self, loss: float) -> float | None:
        """When it was at least as good as that, rounding aside."""
        return next((at for at, found in self.marks if found <= loss + 1e-5), None)


def study_steps(
    lm: LanguageModel, rows: list[PromptRow], start: Slot, allowed: torch.Tensor, plain: bool
) -> Watch:
    """The study's descent: per pass one gradient, per place its 18 best tokens, the best if better.

    Plain: one candidate and one request at a time, no cache, all logits.
    """
    kernel, watch = Kernel(lm, rows), Watch()
    slot, loss = start, plain_loss(lm, rows, start, CrossEntropy())
    for _ in range(STUDY_PASSES):
        scores = kernel.gradient(slot)[1].masked_fill(~allowed, float("inf"))
        order = (-scores).topk(STUDY_TOP, 1).indices.tolist()
        for place, tokens in enumerate(order):
            tried = [t for t in tokens if t != slot[place]][:STUDY_TRIED]
            slots = [(*slot[:place], t, *slot[place + 1 :]) for t in tried]
            if plain:
                losses = [plain_loss(lm, rows, one, CrossEntropy()) for one in slots]
                at = min(range(len(slots)), key=losses.__getitem__)
                found = [(at, losses[at])] if losses[at] < loss else []
            else:
                found = kernel.best(slots, bar=loss)
            if found:
                slot, loss = slots[found[0][0]], found[0][1]
            watch.mark(loss)
    return watch


def pipeline_repair(
    lm: LanguageModel, rows: list[PromptRow], start: Slot, constraints: Constraints, top_k: int
) -> Watch:
    """The pipeline's repair of the same start under the same rule."""
    bound, watch, losses = constraints.bind(lm, rows), Watch(), []
    kernel = Kernel(lm, rows)

    def progress(done: int, of: int) -> None:
        losses.append(time.process_time() - watch.started)

    found = hotflip(
        kernel,
        bound,
        start,
        steps=20,
        top_k=top_k,
        generator=torch.Generator().manual_seed(0),
        progress=progress,
    )
    watch.marks = list(zip(losses, found.curve[1:], strict=False))
    return watch


def against_the_study(lm: LanguageModel) -> list[dict[str, object]]:
    """The same repair one at a time and through the kernel, and the pipeline's, from three starts.

    `time_to_loss_over_baseline` is the time to the loss at which the study's loop ended, over the
    time that the loop took to it.
    """
    rows = study_rows(lm)
    # The study filters texts; all sides are given the same allowed tokens.
    constraints = Constraints(charset="ascii", round_trip=False)
    allowed = constraints.bind(lm, rows).allowed
    tokens = allowed.nonzero()[:, 0]
    results: list[dict[str, object]] = []
    for first in (100, 300, 500):
        start: Slot = tuple(tokens[first : first + 40 * 5 : 40].tolist())
        watches = {
            "study_loop": study_steps(lm, rows, start, allowed, plain=True),
            "its steps": study_steps(lm, rows, start, allowed, plain=False),
        }
        watches["hotflip"] = pipeline_repair(lm, rows, start, constraints, STUDY_TOP)
        took, goal = watches["study_loop"].marks[-1]
        reached = watches["study_loop"].reached(goal)
        for name, watch in watches.items():
            seconds, loss = watch.marks[-1]
            at = watch.reached(goal)
            results.append(
                {
                    "name": name,
                    "baseline": "study_loop",
                    "start": first,
                    "cpu_seconds": seconds,
                    "loss": loss,
                    "cpu_seconds_to_its_loss": at,
                    "time_to_loss_over_baseline": at and reached and at / reached,
                    "cpu_time_over_baseline": seconds / took,
                }
            )
    return results


def singles(slot: Slot, places: list[int], vocabulary: torch.Tensor, count: int) -> list[Slot]:
    """Random single changes at some places, a few of them twice."""
    generator = torch.Generator().manual_seed(len(places))
    found = []
    for i in range(count):
        token = int(vocabulary[int(torch.randint(len(vocabulary), (1,), generator=generator))])
        place = places[i % len(places)]
        found.append((*slot[:place], token, *slot[place + 1 :]))
    return found + found[: count // 4]


def with_and_without(lm: LanguageModel, repeats: int) -> list[dict[str, object]]:
    """What the savings are worth in a step."""
    one = lay_out(
        lm,
        [REQUEST],
        "suffix",
        targets=[lm.tokenizer(TARGET, add_special_tokens=False)["input_ids"]],
    )
    draft, results = bfloat16_copy(lm), []
    for label, rows, length, count in (
        ("suffix, 1 request", one, 8, 256),
        ("prefix, 8 requests", study_rows(lm), 5, 64),
    ):
        vocabulary = Constraints(charset="ascii").bind(lm, rows).allowed.nonzero()[:, 0]
        slot = tuple(vocabulary[100 : 100 + 40 * length : 40].tolist())
        slots = singles(slot, list(range(length)), vocabulary, count)
        settings = {"all on": True, "all off": False}
        spent: dict[str, tuple[int, int]] = {}
        best: dict[str, float] = {}

        def step(name: str, savings: bool) -> None:
            kernel = Kernel(lm, rows, draft=draft, savings=savings)  # noqa: B023
            kernel.best(slots[:1])  # noqa: B023  the head is made once for many steps
            before = kernel.counts
            best[name] = kernel.best(slots)[0][1]  # noqa: B023
            used = kernel.counts - before
            spent[name] = used.tokens, used.draft_tokens  # noqa: B023

        runs = {name: (lambda n=name, on=on: step(n, on)) for name, on in settings.items()}
        times: dict[str, Times] = interleaved(runs, repeats)
        for row in compared(times, "all on"):
            tokens, drafted = spent[str(row["name"])]
            results.append(
                {
                    **row,
                    "baseline": "all on",
                    "step": f"{label}, {len(slots)} candidates",
                    "tokens": tokens,
                    "draft_tokens": drafted,
                    "loss": best[str(row["name"])],
                }
            )
    return results


def main() -> None:
    """Run the parts, or those named in TRIMTAB_BENCH_PARTS."""
    options = arguments(__doc__ or "", repeats=3)
    lm = load("harbor", dtype=torch.float32)
    parts: dict[str, Callable[[], list[dict[str, object]]]] = {
        "savings": lambda: with_and_without(lm, options.repeats),
        "study": lambda: against_the_study(lm),
        "nanogcg": lambda: against_nanogcg(lm),
    }
    wanted = os.environ.get("TRIMTAB_BENCH_PARTS", ",".join(parts)).split(",")
    results = [{"part": part, **row} for part in wanted for row in parts[part]()]
    emit("prompt_kernel", results, options.json)


if __name__ == "__main__":
    main()
