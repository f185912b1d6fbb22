"""The search's page and command: figures are those measured, text stays text, bad input exits 2."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import planted
from cli.test_cli import Ran
from prompts.test_search import QUICK, REFERENCE, WANTED
from report.test_report import EVIL, Page
from trimtab.cli.screen import COLUMNS, LINES, show
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.prompts.pipeline.report import SearchReport
from trimtab.prompts.search import search
from trimtab.prompts.soft.states import match_every_layer
from trimtab.prompts.task.rows import slot_ids
from trimtab.prompts.task.teacher import teacher
from trimtab.report.page import write_page
from trimtab.report.search_page import search_sections, states_section
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def report(model: LanguageModel) -> SearchReport:
    return search(model, REFERENCE, WANTED, **QUICK)


def test_sections_draw_what_was_measured(report: SearchReport) -> None:
    found, stages, baselines, answers = search_sections(report)
    assert report.chosen_text in " ".join(found.paragraphs)
    lines = [trace for trace in stages.figures[0]["data"] if trace["name"] == "a restart"]
    assert len(lines) == QUICK["restarts"]
    for restart, line in enumerate(lines):
        wanted = [report.attempt(f"{s} {restart}").test for s in ("soft", "projected", "repaired")]
        assert line["y"] == pytest.approx(wanted)
    bars = baselines.figures[0]["data"][0]
    assert bars["x"][2] == pytest.approx(report.arm("repaired").gap_closed)
    assert len(stages.tables[1].rows) == len(report.attempts)
    assert len(baselines.tables[1].rows) == len(report.scores)
    assert [table.title for table in answers.tables] == list(WANTED.test)


def test_the_command_prints_one_screen(
    report: SearchReport, capsys: pytest.CaptureFixture[str]
) -> None:
    show(report, report.scores["chosen"])
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= LINES and max(map(len, lines)) <= COLUMNS


def test_the_page_says_that_nothing_was_compared(model: LanguageModel) -> None:
    quick = {**QUICK, "compare": False, "restarts": 1, "judge": False}
    section = search_sections(search(model, REFERENCE, WANTED, **quick))[2]
    assert section.title == "noon: not compared" and "--compare" in section.paragraphs[0]
    assert not section.figures and len(section.tables) == 2


def test_the_page_escapes_everything(report: SearchReport, tmp_path: Path) -> None:
    evil = tuple((EVIL, EVIL) for _ in range(2))
    scores = {name: replace(s, answers=evil, label=EVIL) for name, s in report.scores.items()}
    attempts = tuple(replace(a, text=EVIL) for a in report.attempts)
    spoiled = replace(
        report, scores=scores, attempts=attempts, chosen_text=EVIL, reference=EVIL,
        reference_text=EVIL, model=EVIL, banned_words=(EVIL,),
    )  # fmt: skip
    page = Page(write_page(tmp_path / "evil", search_sections(spoiled), title=EVIL).read_text())
    usual = Page(write_page(tmp_path / "usual", search_sections(report)).read_text())
    assert [t for t, _ in page.tags if t == "script"] == [t for t, _ in usual.tags if t == "script"]
    assert not [t for t, _ in page.tags if t == "img"]
    assert "alert(1)" in "".join(page.shown)


def test_states_are_drawn_layer_by_layer(model: LanguageModel, tmp_path: Path) -> None:
    rows = teacher(model, REFERENCE.text, WANTED, max_new_tokens=3).train[:2]
    states = match_every_layer(
        model,
        rows,
        slot_ids(model, REFERENCE.text, rows[0]),
        generator=torch.Generator().manual_seed(0),
        layers=(0, 2),
        steps=3,
    )
    section = states_section(states)
    first = section.figures[0]["data"][0]
    assert first["x"] == [0.0, 2.0]
    assert first["y"] == pytest.approx([match.cosine for match in states.matches])
    assert len(section.tables[0].rows) == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("search")
    lm = planted.language_model()
    lm.model.save_pretrained(folder / "tiny")
    lm.tokenizer.save_pretrained(folder / "tiny")
    content = planted.behavior(prompt_toward="Say Z.").to_dict()
    path = folder / "opening.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    return folder / "tiny", path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: Ran(capsys, "search", *arguments)


def test_the_command_searches(
    run: Any, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("restarts", "compare", "length", "seed", "repair_steps", "flip_steps")
    quick = {k: v for k, v in QUICK.items() if k not in given}
    monkeypatch.setattr("trimtab.prompts.search.search", partial(search, **quick))
    out, data, page = tmp_path / "p.safetensors", tmp_path / "p.json", tmp_path / "page"
    done = run(
        *files, "--restarts", 1, "--length", 2, "--repair-steps", 2, "--reference", "Say Q.", "-o", out,
        "--json", data, "--report", page, "--journal", tmp_path / "j.jsonl", "--states", "--compare",
    )  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads(data.read_text())
    assert written["reference_text"] == "Say Q." and written["length"] == 2
    lever: Any = load_steering(out)
    assert (lever.text, lever.slot) == (written["chosen_text"], "prefix")
    assert written["chosen_text"].strip() in (page / "index.html").read_text().replace("&#39;", "'")
    assert "pure HotFlip" in done.out and "layer" in done.out
    assert "States, layer by layer" in (page / "index.html").read_text()


def test_the_command_trains_along_a_direction(
    run: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    lm = load(str(files[0]), dtype=torch.float32)
    vector, out, data = tmp_path / "v.safetensors", tmp_path / "s.safetensors", tmp_path / "s.json"
    planted.push(lm).save(vector)
    written_to = ("-o", out, "--json", data, "--report", tmp_path / "page")
    done = run(*files, "--along", vector, "--length", 2, *written_to)
    assert done.code == 0, done.err
    written, lever = json.loads(data.read_text()), load_steering(out)
    assert isinstance(lever, PromptSteering) and lever.vectors is not None
    assert lever.vectors.tolist() == written["vectors"] and len(written["vectors"]) == 2
    assert written["projection"]["3"] > written["projection_start"]["3"]
    assert "projection, layer 3" in done.out
    assert "projection, layer 3" in (tmp_path / "page" / "index.html").read_text()
    done = run(*files, "--along", vector, "--compare", "--states")
    assert done.code == 2 and "--compare, --states" in done.err
    done = run(*files, "--along", out)
    assert done.code == 2 and "no direction" in done.err


def test_help_has_an_example(run: Any) -> None:
    done = run("--help")
    assert done.code == 0 and "Example: trimtab search" in done.out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--requests", "nowhere.yaml"], "no such file"),
        (["--slot", "middle"], "middle"),
        (["--restarts", "0"], "Usage"),
        (["--length", "none"], "Usage"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    run: Any, files: tuple[Path, Path], tmp_path: Path, more: list[str], complaint: str
) -> None:
    done = run(*files, *more, "--json", tmp_path / "x.json", "-o", tmp_path / "p.safetensors")
    assert done.code == 2 and complaint in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_behavior_without_a_prompt_is_refused(
    run: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    content = yaml.safe_load(files[1].read_text())
    del content["prompt_toward"]
    path = tmp_path / "opening.yaml"
    path.write_text(yaml.safe_dump(content))
    done = run(files[0], path)
    assert done.code == 2 and "prompt_toward" in done.err
