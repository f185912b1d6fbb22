"""Time per token with a lever, against the same model without: medians of interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from transformers import DynamicCache

from trimtab.levers.conversions.recovered import Lever, used
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.passes.greedy import collect, greedy
from trimtab.prompts.task.teacher import switched
from trimtab.steering.vector import Switch

TOKENS = 16
ROUNDS = 7


def extra_time(
    lm: LanguageModel,
    levers: Mapping[str, Lever],
    prompt: Prompt,
    *,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Return by how many milliseconds per answer token each lever slows one answer down.

    An answer is the prompt read once and so many tokens decoded one by one with a cache, so longer
    prompts count too. Each round times the unsteered model and every lever in turning order; the
    median of the rounds' differences is taken. Rendering and switching on are not timed. On a CPU it
    is the processor's time, which other work on the machine disturbs less; elsewhere the clock's.
    The answer does not stop at an end token; one round more than `rounds` is run and does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in levers}
    names: list[str | None] = [None, *levers]
    for number in range(rounds + 1):
        turn = number % len(names)
        seconds: dict[str | None, float] = {}
        for name in names[turn:] + names[:turn]:
            lever = None if name is None else levers[name]
            seconds[name] = _seconds(*used(lm, lever), prompt, tokens)
        for name in levers if number else ():
            found[name].append(1000 * (seconds[name] - seconds[None]) / tokens)
    return {name: statistics.median(values) for name, values in found.items()}


def _seconds(lm: LanguageModel, lever: Switch | None, prompt: Prompt, tokens: int) -> float:
    with switched(lm, lever):
        (batch,) = lm.batches([lm.encode(prompt)])
        cache = DynamicCache(config=text_config(lm.model))  # the one that the model makes itself
        clock = time.process_time if lm.device.type == "cpu" else time.perf_counter
        began = clock()
        collect(greedy(lm, batch, cache), 1, tokens)
        return clock() - began
