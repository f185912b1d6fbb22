"""A prompt search of 12 restarts, here and on two Ray workers, also when one of them is lost midway.

Baseline: the local engine. What is found has to be the same in every run; the ratio of wall time says
what two workers are worth on this machine, whose cores they share.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import emit
from trimtab import behavior, load
from trimtab.engine import open_engine
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.prompts.pipeline.report import SearchReport
from trimtab.prompts.search import search
from trimtab.results.journal import Journal, Notes

# Small in everything but the restarts: what is compared are the engines, not the search.
SETTINGS = {
    "compare": True, "restarts": 12, "soft_steps": 8, "repair_steps": 3, "flip_steps": 3, "gcg_steps": 2,
    "gcg_width": 16, "top_k": 8, "train_requests": 2, "completion_tokens": 12, "length": 6,
    "projection_options": {"batch_size": 2, "steps": 8},
}  # fmt: skip


def itself(lm: LanguageModel) -> LanguageModel:
    return lm


def process(number: int, lm: LanguageModel, notes: Notes) -> int:
    return os.getpid()


class Killer:
    """Ends one worker when half of the search is done."""

    def __init__(self, engine: Engine, lm: LanguageModel) -> None:
        self.pids = engine.map(Job(lm, itself), [partial(process, i) for i in range(4)])
        self.killed = 0

    def __call__(self, done: int, total: int) -> None:
        if done >= total // 2 and not self.killed:
            self.killed = self.pids[0]
            os.kill(self.killed, signal.SIGKILL)


def main() -> None:
    """Run the search three times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--restarts", type=int, default=12)
    options = parser.parse_args()
    lm, wanted = load("harbor", dtype=torch.float32), behavior("topic")
    settings: dict[str, Any] = {**SETTINGS, "restarts": options.restarts}
    found: dict[str, SearchReport] = {}
    rows: dict[str, dict[str, object]] = {}
    with TemporaryDirectory() as folder, open_engine("ray", lm, workers=2) as ray:
        killer = Killer(ray, lm)  # workers are there, and hold the model, before the clock starts
        runs = {"local": (None, None), "ray": (ray, None), "ray_lost_worker": (ray, killer)}
        for name, (engine, progress) in runs.items():
            path, began = Path(folder) / name, time.perf_counter()
            found[name] = search(
                lm, wanted, journal=path, engine=engine, progress=progress, judge=False, **settings
            )
            entries = Journal(path, _header(path)).entries
            finished = [e["finished"] for e in entries if "finished" in e]
            rows[name] = {
                "seconds": time.perf_counter() - began,
                "same_as_local": found[name].attempts == found["local"].attempts
                and found[name].lever == found["local"].lever,
                "finished_twice": len(finished) - len(set(finished)),
            }
    local = float(str(rows["local"]["seconds"]))
    for row in rows.values():
        row["seconds_over_local"] = float(str(row["seconds"])) / local
    rows["ray_lost_worker"]["killed"] = bool(killer.killed)
    result = {"baseline": "local", "settings": settings, "workers": 2, "runs": rows}
    emit("engines", [{**result, "threads": torch.get_num_threads()}], options.json)


def _header(path: Path) -> dict[str, object]:
    """The header of a journal, without what the journal adds."""
    first = json.loads(path.read_text().splitlines()[0])
    return {key: value for key, value in first.items() if key not in ("format", "version")}


if __name__ == "__main__":
    main()
