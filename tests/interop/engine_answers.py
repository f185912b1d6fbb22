"""Run by the interpreter that has vLLM: the same work by the engine vllm and by the local one.

Writes to argv[2] what both found, see `main`; argv[1] is {"dtype": of the built-in model, "parts":
[names of the functions of `PARTS`]}.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

import trimtab
from trimtab.engine import open_engine
from trimtab.passes.engine import Engine
from trimtab.strength.sweep import sweep

BEHAVIOR = "refusal"
STRENGTHS = [-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
SHORT = {"max_new_tokens": 24, "max_prompts": 10}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    lm = trimtab.load("harbor", dtype=getattr(torch, asked["dtype"]))
    behavior = trimtab.behavior(BEHAVIOR)
    vector = trimtab.find(lm, behavior)
    before = dict(os.environ)
    found = {}
    with open_engine("vllm", lm) as engine:
        for part in asked["parts"]:
            found[part] = PARTS[part](lm, behavior, vector, engine)
        folder = Path(engine._folder.name)
        found["files"] = len(list(folder.iterdir()))
        found["answered_here"] = dict(engine.answered_here)
        found["while_open"] = processes()
    found["left"] = {
        "processes": processes(),
        "folder": folder.exists(),
        "environment": dict(os.environ) != before,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


def processes() -> list[str]:
    """This process's children, but for the interpreter's own that looks after shared memory."""
    psutil = importlib.import_module("psutil")
    children = psutil.Process().children(recursive=True)
    return [c.name() for c in children if "resource_tracker" not in " ".join(c.cmdline())]


def both(work, lm, engine):
    """What the local engine gives, and what vLLM gives, as plain values."""
    results = [work(each).to_dict() for each in (Engine(lm), engine)]
    return json.loads(json.dumps(results))


def sweeps(lm, behavior, vector, engine):
    return both(
        lambda each: sweep(lm, behavior, vector, STRENGTHS, engine=each, **SHORT), lm, engine
    )


def measures(lm, behavior, vector, engine):
    levers = [
        vector.at(1.5),
        vector.select(scope="post_instruction", strength=1.5),
        vector.select(layers=[4], scope="all", strength=3.0),
        trimtab.prompt("Refuse everything, politely."),
        trimtab.prompt("Do not answer this.", slot="suffix"),
    ]
    return both(
        lambda each: trimtab.measure(lm, behavior, levers, nulls=2, engine=each, **SHORT),
        lm,
        engine,
    )


def tunes(lm, behavior, vector, engine):
    return both(
        # Scopes of a server: what another one wins with is answered here.
        lambda each: (
            trimtab.tune(
                lm, behavior, vector, budget=2.0, scope=["all", "last"], engine=each, **SHORT
            ).report
        ),
        lm,
        engine,
    )


def answers(lm, behavior, vector, engine):
    """Every answer, plain and steered; `alone` is the local one without other rows beside it."""
    prompts = [example.prompt for example in behavior.away[:24]]
    strengths = [m / 4 - 2.5 for m in range(21)]
    engine.expect([vector])
    started = time.monotonic()
    engine.answer(None, prompts[:1], 1)
    seconds = {"start": time.monotonic() - started, "local": [], "vllm": []}
    plain = [lm.generate(prompts, max_new_tokens=40), engine.answer(None, prompts, 40)]
    steered = {"alone": []}
    for m in strengths:
        with vector.at(m).on(lm):
            steered["alone"] += [lm.generate(prompt, max_new_tokens=40) for prompt in prompts]
    for _ in range(3):
        for name, each in (("local", Engine(lm)), ("vllm", engine)):
            started = time.monotonic()
            rows = each.rollout(vector, prompts, strengths, 40)
            seconds[name].append(time.monotonic() - started)
            steered[name] = [text for row in rows for text in row]
    return {"plain": plain, "steered": steered, "seconds": seconds}


PARTS = {"answers": answers, "sweep": sweeps, "measure": measures, "tune": tunes}


if __name__ == "__main__":
    main()
