"""The search: stages and baselines, one result whether cut off or not, prompts scored from text."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import planted
import tiny
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.prompts.pipeline.attempt import ARMS, Attempt, costing
from trimtab.prompts.pipeline.report import SearchReport, best_of, gap_closed, summarize
from trimtab.prompts.pipeline.stages import soft_entry, soft_of
from trimtab.prompts.pipeline.task import Settings
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.search import _reference, search
from trimtab.prompts.soft.soft import Soft
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.references import ReferencePrompt, load_reference, reference_of
from trimtab.prompts.task.requests import Requests
from trimtab.prompts.task.rows import slot_ids
from trimtab.prompts.task.teacher import teacher_rows
from trimtab.prompts.task.words import Words
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering

WANTED = Requests(
    ("How is noon?", "Where is the pier?", "Who asks?"),
    ("Is it open?", "May I?"),
    ("What is new?", "Why not?", "When?"),
)
QUICK: dict[str, Any] = {
    "restarts": 2, "compare": True, "length": 3, "train_requests": 2, "completion_tokens": 4, "soft_steps": 4,
    "projection_options": {"steps": 4}, "repair_steps": 3, "flip_steps": 2, "top_k": 4,
    "gcg_steps": 2, "gcg_width": 4, "seed": 1,
    "answer_tokens": 4, "sampling_seeds": 1,
}  # fmt: skip
REFERENCE = ReferencePrompt("noon", "Talk about noon.", planted.behavior().judge)


def run(lm: LanguageModel, journal: Path | None = None, **more: Any) -> SearchReport:
    return search(lm, REFERENCE, WANTED, journal=journal, **{**QUICK, **more})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def made(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchReport, Path]:
    path = tmp_path_factory.mktemp("search") / "journal.jsonl"
    return run(model, path), path


def plain(report: SearchReport) -> dict[str, Any]:
    """Everything but what the clock and the counters of an interrupted run say."""
    found: Any = json.loads(json.dumps(report.to_dict()))
    for entry in (found, *found["attempts"]):
        for name in ("seconds", "calls", "tokens"):
            entry.pop(name, None)
    for arm in found["arms"]:
        arm.pop("tokens")
    return found


def test_every_arm_is_there_with_every_restart(made: tuple[SearchReport, Path]) -> None:
    report, _ = made
    names = [a.name for a in report.attempts]
    assert len(names) == len(set(names))
    for arm in ARMS:
        wanted = 1 if arm in ("reference", "gcg") else QUICK["restarts"]
        assert sum(a.arm == arm for a in report.attempts) == report.arm(arm).n == wanted
    assert [summary.arm for summary in report.arms] == list(ARMS)
    assert {"chosen", "repaired", "hotflip_random", "random", "reference", "no prompt"} <= set(
        report.scores
    )


def test_what_searches_ends_within_the_constraints(
    model: LanguageModel, made: tuple[SearchReport, Path]
) -> None:
    words = Words(REFERENCE.words)
    for attempt in made[0].attempts:
        if attempt.arm in ("repaired", "hotflip_random", "hotflip_reference", "gcg"):
            assert attempt.legal and attempt.text.isascii() and attempt.text.isprintable()
            assert not words.found(attempt.text) and len(attempt.ids) == QUICK["length"]
    start = made[0].attempt("hotflip_reference 0")
    assert start.violated_start["words"] >= 1 and start.details["repair_steps"] >= 1
    assert made[0].arm("hotflip_reference").infeasible == QUICK["restarts"]


def test_losses_are_those_of_the_text(
    model: LanguageModel, made: tuple[SearchReport, Path]
) -> None:
    report = made[0]
    lever = PromptSteering(REFERENCE.text, slot="prefix")
    for split, field in (("train", "train"), ("validation", "validation"), ("test", "test")):
        requests = getattr(WANTED, split)
        requests = requests[: QUICK["train_requests"]] if split == "train" else requests
        rows = teacher_rows(model, lever, requests, QUICK["completion_tokens"])
        for name in ("repaired 0", "hotflip_random 1", "gcg 0"):
            attempt = report.attempt(name)
            ids = slot_ids(model, attempt.text, rows[0])
            assert ids == attempt.ids
            loss = plain_loss(model, rows, ids, CrossEntropy())
            assert getattr(attempt, field) == pytest.approx(loss, abs=1e-4)
    assert report.check.same_ids and report.check.difference < 1e-4
    scores = report.scores["chosen"].likelihood.ce.mean
    assert scores == pytest.approx(report.attempt(report.chosen).test, abs=1e-4)


def test_repair_never_worsens_what_was_projected(made: tuple[SearchReport, Path]) -> None:
    for restart in range(QUICK["restarts"]):
        repaired = made[0].attempt(f"repaired {restart}")
        assert repaired.train <= repaired.details["from"] + 1e-9


def test_pure_hotflip_gets_what_the_pipeline_is_worth(made: tuple[SearchReport, Path]) -> None:
    report = made[0]
    for restart in range(QUICK["restarts"]):
        stages = [report.attempt(f"{s} {restart}") for s in ("soft", "projected", "repaired")]
        details = report.attempt(f"hotflip_random {restart}").details
        assert details["scored"] >= details["budget"] > stages[-1].details["scored"]
        assert details["descents"] > 1
    pipeline, rival = report.arm("repaired"), report.arm("hotflip_random")
    assert rival.tokens >= 0.8 * pipeline.tokens


def test_the_choice_is_made_on_validation(made: tuple[SearchReport, Path]) -> None:
    report = made[0]
    searching = [
        a
        for a in report.attempts
        if a.arm in ("repaired", "hotflip_random", "hotflip_reference", "gcg")
    ]
    assert report.attempt(report.chosen).validation == min(a.validation for a in searching)
    assert report.lever.text == report.chosen_text and report.lever.slot == "prefix"


def test_a_journal_cut_anywhere_gives_the_same_report(
    model: LanguageModel, made: tuple[SearchReport, Path], tmp_path: Path
) -> None:
    report, path = made
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in (len(lines) // 3, len(lines) - 2):
        cut = tmp_path / f"cut{kept}.jsonl"
        cut.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        assert plain(run(model, cut)) == plain(report)


def test_a_finished_journal_searches_nothing(
    model: LanguageModel, made: tuple[SearchReport, Path]
) -> None:
    report, path = made
    before = path.read_bytes()
    ticks: list[tuple[int, int]] = []
    again = run(model, path, progress=lambda done, total: ticks.append((done, total)))
    assert again == report and path.read_bytes() == before
    assert ticks[-1] == (len(report.attempts), len(report.attempts))


def test_the_journal_of_other_work_is_refused(
    model: LanguageModel, made: tuple[SearchReport, Path]
) -> None:
    with pytest.raises(TrimtabError, match="other work"):
        run(model, made[1], seed=2)
    with pytest.raises(TrimtabError, match="other work"):
        search(model, "Be brief.", WANTED, journal=made[1], **QUICK)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from prompts.test_search import planted, run
run(planted.language_model(), Path(sys.argv[1]))
"""


def test_killed_in_the_middle_it_ends_alike(
    model: LanguageModel, made: tuple[SearchReport, Path], tmp_path: Path
) -> None:
    path = tmp_path / "killed.jsonl"
    folder = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert plain(run(model, path)) == plain(made[0])


def test_restarts_may_be_added_later(
    model: LanguageModel, made: tuple[SearchReport, Path], tmp_path: Path
) -> None:
    path = tmp_path / "more.jsonl"
    run(model, path, restarts=1, judge=False)
    assert plain(run(model, path)) == plain(made[0])


def test_without_a_comparison_the_pipeline_alone_searches(
    model: LanguageModel, made: tuple[SearchReport, Path], tmp_path: Path
) -> None:
    path, ticks = tmp_path / "alone.jsonl", list[tuple[int, int]]()
    quick = {name: value for name, value in QUICK.items() if name != "compare"}
    alone = search(
        model, REFERENCE, WANTED, journal=path, progress=lambda *tick: ticks.append(tick), **quick
    )
    assert [a.arm for a in alone.arms] == ["soft", "projected", "repaired", "random", "reference"]
    settings = cast("dict[str, object]", alone.to_dict()["settings"])
    assert not alone.compared and settings["compare"] is False
    assert any("--compare" in note for note in alone.table().notes)
    report = made[0]
    assert report.compared and not any("--compare" in note for note in report.table().notes)
    for attempt in alone.attempts:
        assert attempt == report.attempt(attempt.name)
    assert alone.chosen.startswith("repaired")
    assert set(alone.scores) == {"chosen", "random", "reference", "no prompt"}
    assert ticks[-1] == (len(alone.attempts), len(alone.attempts)) == (9, 9)
    assert plain(run(model, path)) == plain(report)


def test_other_seeds_start_elsewhere(model: LanguageModel, made: tuple[SearchReport, Path]) -> None:
    other = run(model, seed=2, restarts=1, judge=False)
    assert other.attempt("random 0").ids != made[0].attempt("random 0").ids
    assert other.scores["chosen"].judged is None


def test_suffixes_of_a_behavior(model: LanguageModel) -> None:
    behavior = planted.behavior(10, prompt_toward=" Say Z.")
    quick = {**QUICK, "restarts": 1, "gcg_restarts": 0}
    report = search(model, behavior, slot="suffix", **quick)
    assert report.lever.slot == "suffix" and report.separator == ""
    assert report.check.same_ids and report.check.difference < 1e-4
    assert not any(a.arm == "gcg" for a in report.attempts)
    assert report.reference == behavior.name and report.scores["chosen"].judged is not None


def test_the_lever_is_saved_and_loaded(made: tuple[SearchReport, Path], tmp_path: Path) -> None:
    path = made[0].lever.save(tmp_path / "p.safetensors")
    assert load_steering(path) == made[0].lever


def test_gap_closed_and_summaries() -> None:
    assert gap_closed(1.0, 1.0, 0.5) == 0 and gap_closed(0.5, 1.0, 0.5) == 1
    assert gap_closed(0.25, 1.0, 0.5) == 1.5 and math.isnan(gap_closed(1, 1, 1))

    def attempt(arm: str, restart: int, validation: float, test: float, **more: Any) -> Attempt:
        fields: dict[str, Any] = {"violated_start": {}, "legal": True, **more}
        return Attempt(arm, restart, (1,), "x", test, validation=validation, test=test, **fields)

    listed = [
        attempt("reference", 0, 0.5, 0.5),
        attempt("random", 0, 1.4, 1.5),
        attempt("random", 1, 1.6, 1.7),
        attempt("repaired", 0, 0.9, 0.6),
        attempt("repaired", 1, 0.8, 1.0, violated_start={"words": 1}),
        attempt("repaired", 2, 0.1, 0.1, legal=False),
    ]
    assert best_of(listed[3:]).restart == 1
    found = {summary.arm: summary for summary in summarize(listed)}
    repaired = found["repaired"]
    assert repaired.mean == pytest.approx(1.7 / 3) and (repaired.least, repaired.most) == (0.1, 1.0)
    assert (repaired.n, repaired.infeasible, repaired.legal) == (3, 1, 2)
    assert repaired.chosen_ce == 1.0 and repaired.chosen_gap_closed == pytest.approx(0.6 / 1.1)
    assert repaired.excess == pytest.approx(1.7 / 3 - 0.5)
    assert found["random"].gap_closed == pytest.approx(0) and found["reference"].gap_closed == 1


def test_vectors_survive_a_journal_bit_for_bit() -> None:
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    soft = Soft(vectors, 0.5, 0.6, (), 0, 0, 0.0, "random tokens")
    again = soft_of(json.loads(json.dumps(soft_entry(soft))))
    assert torch.equal(again.vectors, vectors) and (again.loss, again.init) == (0.5, soft.init)


def test_cost_counts_what_is_fed(model: LanguageModel) -> None:
    (batch,) = model.batches([model.encode("Why?"), model.encode("How is it?")])
    fed = batch.input_ids.numel()
    with costing(model) as cost:
        with torch.no_grad():
            model.forward(batch)
        model.forward(batch)
    assert (cost.calls, cost.tokens) == (2, fed + 3 * fed)
    assert not model.sites.trunk._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"restart": 3}, "no such setting"),
        ({"restarts": 0}, "no count"),
        ({"projection": "guess"}, "no such projection"),
        ({"init": "zeros"}, "no such init"),
        ({"settings": Settings(), "seed": 3}, "beside it"),
    ],
)
def test_wrong_settings_are_refused(
    model: LanguageModel, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TrimtabError, match=complaint):
        search(model, REFERENCE, WANTED, **options)


def test_without_requests_it_asks_for_them(model: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no requests"):
        search(model, "Be brief.")
    with pytest.raises(TrimtabError, match="soft prompt"):
        search(model, PromptSteering("", vectors=torch.ones(2, model.d_model)), WANTED)


def test_a_built_in_reference_by_its_name() -> None:
    cats = load_reference("cats")
    assert _reference("harbor:cats") == cats
    assert load_reference("harbor:cats") == cats == reference_of(planted.behavior(), "harbor:cats")
    with pytest.raises(TrimtabError, match="no built-in reference"):
        search(tiny.language_model("llama"), "harbor:cat", WANTED)


def test_own_constraints_hold() -> None:
    lm = tiny.language_model("llama")
    limits = Constraints(max_chars=6)
    report = search(
        lm, REFERENCE, WANTED, constraints=limits, judge=False, **{**QUICK, "restarts": 1}
    )
    assert len(report.chosen_text) <= 6 and report.banned_words == ()
    assert replace(report).settings["length"] == QUICK["length"]
