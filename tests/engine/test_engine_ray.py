"""Independent work on the workers of a Ray cluster: the local results, whatever happens to a worker."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import behavior, load, measure, prompt, sweep, tune
from trimtab.engine import open_engine
from trimtab.engine.worker import Worker, WorkerJob
from trimtab.errors import TrimtabError
from trimtab.methods import each, find
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine
from trimtab.passes.job import Job
from trimtab.prompts.search import search
from trimtab.results.journal import Journal, Notes
from trimtab.steering.vector import VectorSteering


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    # In half precision the last digits depend on which rows share a batch.
    return load("harbor", dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(lm: LanguageModel) -> VectorSteering:
    return find(lm, behavior("refusal"), "next_token", scope="all", steps=24)


@pytest.fixture(scope="module")
def engine(lm: LanguageModel) -> Iterator[Engine]:
    with open_engine("ray", lm, workers=2) as engine:
        yield engine


def square(number: int, lm: LanguageModel, notes: Notes) -> tuple[int, int, int]:
    return number * number, lm.n_layers, os.getpid()


def itself(lm: LanguageModel) -> LanguageModel:
    return lm


def counting_down(folder: Path, number: int, lm: LanguageModel, notes: Notes) -> list[int]:
    """Note five steps; one unit ends its worker in the middle, once."""
    known = [e["step"] for e in notes.entries if e["unit"] == number]
    with open(folder / "steps", "a") as file:
        for step in range(len(known), 5):
            file.write(f"{number} {step}\n")
            file.flush()
            notes.add({"unit": number, "step": step})
            if number == 1 and step == 2 and not (folder / "killed").exists():
                (folder / "killed").touch()
                time.sleep(0.5)  # what was noted is on its way
                os.kill(os.getpid(), signal.SIGKILL)
    return [e["step"] for e in notes.entries if e["unit"] == number]


def always_killed(lm: LanguageModel, notes: Notes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(lm: LanguageModel, notes: Notes) -> None:
    raise TrimtabError("a unit", "a reason", "an advice")


def test_units_run_on_two_workers_in_order(lm: LanguageModel, engine: Engine) -> None:
    job = Job(lm, itself)
    heard: list[int] = []
    found = engine.map(
        job, [partial(square, i) for i in range(8)], done=lambda i, _: heard.append(i)
    )
    assert [value for value, _, _ in found] == [i * i for i in range(8)]
    assert {layers for _, layers, _ in found} == {lm.n_layers}
    pids = {pid for _, _, pid in found}
    assert len(pids) == 2 and os.getpid() not in pids
    assert sorted(heard) == list(range(8))


def test_a_lost_worker_loses_no_step(lm: LanguageModel, engine: Engine, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {"work": "counting"})
    units = [partial(counting_down, tmp_path, i) for i in range(4)]
    assert engine.map(Job(lm, itself), units, notes=journal) == [list(range(5))] * 4
    done = (tmp_path / "steps").read_text().split("\n")[:-1]
    # Every step was done once, also those of the unit whose worker was lost.
    assert sorted(done) == [f"{unit} {step}" for unit in range(4) for step in range(5)]
    again = Journal(tmp_path / "journal", {"work": "counting"})
    assert len(again.entries) == 20


def test_work_that_kills_every_worker_is_given_up(lm: LanguageModel, engine: Engine) -> None:
    with pytest.raises(TrimtabError, match="lost 3 workers"):
        engine.map(Job(lm, itself), [always_killed])


def test_an_error_of_a_unit_is_the_users(lm: LanguageModel, engine: Engine) -> None:
    with pytest.raises(TrimtabError) as caught:
        engine.map(Job(lm, itself), [refused])
    assert caught.value.advice == "an advice"


def test_prompts_get_the_drivers_system_text_on_workers(lm: LanguageModel, engine: Engine) -> None:
    before = lm.system
    try:
        lm.system = "Speak of boats."
        assert engine.map(Job(lm, itself), [system_of]) == ["Speak of boats."]
    finally:
        lm.system = before
    assert engine.map(Job(lm, itself), [system_of]) == [before]


def system_of(lm: LanguageModel, notes: Notes) -> str | None:
    return lm.system


KEPT: dict[str, Any] = {"max_prompts": 4, "max_new_tokens": 12}


def test_a_sweep_measures_the_same(
    lm: LanguageModel, engine: Engine, trained: VectorSteering
) -> None:
    part, unit = behavior("refusal").split(0).validation, trained.strength
    strengths = [k * unit for k in (-1, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25)]
    here, there = (
        sweep(lm, part, trained, strengths, engine=each, **KEPT) for each in (None, engine)
    )
    assert here.rows == there.rows


def test_levers_measure_the_same(
    lm: LanguageModel, engine: Engine, trained: VectorSteering
) -> None:
    levers = [trained, prompt("Refuse politely.")]
    here, there = (
        measure(lm, behavior("refusal"), levers, nulls=2, engine=each, **KEPT)
        for each in (None, engine)
    )
    assert here == there


def test_tuning_chooses_the_same(
    lm: LanguageModel, engine: Engine, trained: VectorSteering
) -> None:
    here, there = (
        tune(
            lm, behavior("refusal"), trained, engine=each, max_prompts=10, max_new_tokens=24
        ).report
        for each in (None, engine)
    )
    same = {"seconds": 0.0, "model_calls": 0}
    assert replace(here, **same) == replace(there, **same)
    assert there.model_calls > 0.5 * here.model_calls


def test_a_search_finds_the_same_though_a_worker_is_lost(
    lm: LanguageModel, engine: Engine, tmp_path: Path
) -> None:
    small: dict[str, Any] = {
        "restarts": 4, "compare": True, "soft_steps": 2, "repair_steps": 1, "flip_steps": 1, "top_k": 2,
        "train_requests": 1, "completion_tokens": 4, "length": 3, "gcg_steps": 1, "gcg_width": 2,
        "sampling_seeds": 1, "answer_tokens": 4, "projection_options": {"batch_size": 1, "steps": 2},
    }  # fmt: skip
    pids = {
        pid for _, _, pid in engine.map(Job(lm, itself), [partial(square, i) for i in range(4)])
    }
    killed: list[int] = []

    def lose_one(done: int, total: int) -> None:
        if done >= total // 2 and not killed:
            killed.append(pids.pop())
            os.kill(killed[0], signal.SIGKILL)

    wanted, few = behavior("topic"), {**small, "judge": False}
    here = search(lm, wanted, journal=tmp_path / "here", **few)
    there = search(lm, wanted, journal=tmp_path / "there", engine=engine, progress=lose_one, **few)
    assert killed and here.attempts == there.attempts and len(here.attempts) == 1 + 4 * 7 + 1
    assert here.lever == there.lever
    lines = [sorted(finished(tmp_path / name)) for name in ("here", "there")]
    assert lines[0] == lines[1]  # what was finished was not done again


def finished(path: Path) -> list[str]:
    return re.findall(r'"finished": "([^"]+)"', path.read_text())


def test_selected_differences_are_the_same(lm: LanguageModel, engine: Engine) -> None:
    options = {"max_prompts": 4, "max_kl": 5.0, "min_induce": -50.0}
    here, there = (
        find(lm, behavior("refusal"), "selected_difference", engine=each, **options)
        for each in (None, engine)
    )
    assert here.provenance == there.provenance and here.strength == there.strength
    assert all(torch.equal(c, there.directions[x]) for x, c in here.directions.items())


def test_several_vectors_are_found_at_once(lm: LanguageModel, engine: Engine) -> None:
    wanted = [
        each.Wanted(behavior(name), "pca", (layer,))
        for name in ("refusal", "mood")
        for layer in (3, 4)
    ]
    assert [one.name for one in wanted] == ["refusal-3", "refusal-4", "mood-3", "mood-4"]
    for here, there in zip(
        each.find_each(lm, wanted), each.find_each(lm, wanted, engine=engine), strict=True
    ):
        assert here.layers == there.layers and here.provenance == there.provenance
        assert all(torch.equal(c, there.directions[x]) for x, c in here.directions.items())
    with pytest.raises(TrimtabError, match="refusal-3 twice"):
        each.find_each(lm, [wanted[0], wanted[0]])


def test_what_workers_cannot_do_is_refused_by_name(lm: LanguageModel, engine: Engine) -> None:
    with pytest.raises(TrimtabError, match="no independent parts"):
        find(lm, behavior("refusal"), "mean_difference", engine=engine)
    made = LanguageModel(lm.model, lm.tokenizer, "made")
    with pytest.raises(TrimtabError, match="made in memory"):
        open_engine("ray", made)
    with pytest.raises(TrimtabError, match="no such|choose|engine"):
        open_engine("slurm", lm)
    with pytest.raises(TrimtabError, match="engine that has none"):
        open_engine("local", lm, workers=2)


def test_a_worker_with_other_weights_refuses(lm: LanguageModel) -> None:
    assert lm.source is not None
    with pytest.raises(TrimtabError, match="other weights"):
        _ = Worker(WorkerJob(lm.source, lm.name, "of another", None)).lm
