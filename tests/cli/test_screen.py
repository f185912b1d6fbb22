"""What a command prints fits a screen, conclusions first; --full prints everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
import trimtab as tt
import trimtab.cli  # noqa: F401, registers the commands
from levers.test_levers_advice import row as lever_row
from report.test_report import figures, steered
from trimtab.cli.app import app
from trimtab.cli.screen import COLUMNS, LINES, show
from trimtab.evaluation.tasks.table import TaskMeasurement, TaskScore, rows_of
from trimtab.levers.advice import advise
from trimtab.levers.table import LeversTable
from trimtab.prediction.law_check import BudgetCheck, LawCheck
from trimtab.prediction.laws import LawsReport
from trimtab.prompts.gap.gap_search import GapSearch, HeldOut
from trimtab.prompts.gap.steps import GapStep
from trimtab.prompts.gap.steps import Grown as GapFound
from trimtab.results.intervals import Interval
from trimtab.results.tables import Table
from trimtab.strength.sweep import SweepRow

DEEP = 30
BEHAVIOR = """
name: polite
toward: ["Could you name a tree?", "May I ask the time?", Please say it., "Would you list it?"]
away: [Name a tree., "Time?", Say it., List a color.]
neutral: ["What is rain?", "Who wrote it?", "Where is the sea?"]
judge: {kind: phrases, toward: [the], away: [a]}
readout: {toward: [yes], away: [no]}
prompt_toward: Answer politely.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 layers, a behavior and a vector."""
    place = tmp_path_factory.mktemp("deep")
    shape = tiny.config("llama")
    shape.num_hidden_layers = DEEP
    lm = tiny.language_model(shape)
    lm.model.save_pretrained(place / "model")
    lm.tokenizer.save_pretrained(place / "model")
    (place / "polite.yaml").write_text(BEHAVIOR)
    run(f"find {place}/model {place}/polite.yaml -o {place}/v.safetensors --layers 0-29")
    return place


def run(line: str) -> list[str]:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


COMMANDS = {
    "find": "find {0}/model {0}/polite.yaml -o {0}/w.safetensors --layers 0-29",
    "audit": "audit {0}/model {0}/polite.yaml",
    "inspect a vector": "inspect {0}/v.safetensors",
    "inspect a model": "inspect {0}/model",
    "measure": "measure {0}/model {0}/polite.yaml {0}/v.safetensors --max-new-tokens 2 --nulls 1",
    "doctor": "doctor",
    "convert": "convert {0}/model {0}/polite.yaml prompt:Say --to vector --max-prompts 1 "
    "--max-new-tokens 2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_fits_a_screen(folder: Path, name: str) -> None:
    lines = run(COMMANDS[name].format(folder))
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS, "\n".join(lines)


def test_audit_says_its_conclusion_first_and_everything_when_asked(folder: Path) -> None:
    line = COMMANDS["audit"].format(folder)
    short, whole = run(line), run(f"{line} --full")
    assert short[0].startswith("audit of polite")
    assert short[-1].startswith("More with --full:") and "First-order radius" in short[-1]
    assert len(whole) > 2 * LINES and sum("First-order radius" in each for each in whole) == 1


def grid(rows: int, columns: int, width: int = 6) -> Table:
    names = tuple(f"c{i}".ljust(width, "x") for i in range(columns))
    return Table("a title", names, tuple((str(r),) * columns for r in range(rows)), ("a note",))


def deep_tune() -> list[Table]:
    curve = tuple(
        SweepRow(**figures(min(1.0, k / 40)), strength=k / 10, alphas={}) for k in range(DEEP)
    )
    alphas = {layer: 3.21 + layer for layer in range(DEEP)}
    report = steered().tuned
    return [replace(report, layers=tuple(alphas), alpha=alphas, curve=curve).table()]


def deep_laws() -> list[Table]:
    budgets = tuple(
        BudgetCheck(name, nats, 1.5, 1.02, 0.9, 1.1)
        for name in ("tilt", "norm")
        for nats in (0.01, 0.1, 0.5, 2.0)
    )
    whole = LawCheck(
        "v", tuple(range(DEEP)), "all", 1, 16, budgets, 2.0, 0.9, 0.9, 0.99, "x", 0.5, (), False
    )
    depth = tuple(replace(whole, layers=(layer,)) for layer in range(DEEP))
    anything: Any = None
    return [LawsReport("b", "m", "f", anything, whole, depth, anything, anything).table()]


def deep_levers() -> list[Table]:
    rows = tuple(lever_row(f"vector at layer {layer}", layer) for layer in range(DEEP))
    rows = (lever_row("unsteered", 0, "baseline"), *rows, lever_row("random", 0, "null"))
    advice = advise(rows, "polite", 0.5)
    missing = {"LoRA": "no train prompt was answered " * 9}
    table = LeversTable("polite", "d", "m", "f", 1, 0.5, 0, rows, missing, advice, "answers", 1.0)
    return [table.table()]


def deep_tasks() -> list[Table]:
    score = TaskScore(0.5, 0.1, 3, (1.0, 0.0, 0.5))
    scores = {(f"task_{number}", "acc"): score for number in range(DEEP)}
    rows = rows_of("baseline", "baseline", None, scores, None, [], 0)
    rows += rows_of("v", "vector", 2.0, scores, scores, [scores], 0)
    names = tuple(name for name, _ in scores)
    made = TaskMeasurement("m", "f", names, "lm-eval 0", 3, None, False, 0, tuple(rows), ("a",))
    return [made.table()]


def deep_gap() -> list[Table]:
    steps = tuple(GapStep(k, f"token {k}", 1.0, 0.5) for k in range(DEEP))
    found = GapFound("sort", tuple(range(DEEP)), steps, -1.0, 1.0, 1.0, "closed", 9)
    share = Interval(0.5, 0.25, 0.75)
    held = HeldOut(32, share, share, 0.1, share, 0.5, 0.1)
    text = "words " * DEEP
    closed = GapSearch(
        "polite", 1, "logsumexp", tt.prompt(text, "suffix"), text, found, held, (0.1, 3), 0.2, 90.0, 1.0
    )
    return [closed.table(), found.table()]


RESULTS = {
    "tune": deep_tune,
    "laws": deep_laws,
    "levers": deep_levers,
    "tasks": deep_tasks,
    "close-gap": deep_gap,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_deep_result_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Results that take long to measure: the same tables, with made-up figures of 30 layers."""
    tables = RESULTS[name]()
    show(*tables)
    short = capsys.readouterr().out.splitlines()
    assert len(short) <= LINES and max(map(len, short)) <= COLUMNS, "\n".join(short)
    assert short[0].strip()[:20] == tables[0].title[:20]
    show(*tables, full=True)
    assert len(capsys.readouterr().out.splitlines()) > len(short)


def test_a_long_table_shows_both_ends_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show(grid(100, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[0] == "0" and "(16 of 100 rows; all with --full)" in lines
    assert any(line.split()[:1] == ["99"] for line in lines) and lines[-1] == "a note"
    show(grid(100, 3), full=True)
    whole = capsys.readouterr().out
    assert all(f" {row} " in whole for row in range(100))


def test_a_wide_table_of_few_rows_lies_on_its_side(capsys: pytest.CaptureFixture[str]) -> None:
    show(grid(2, 14, width=9))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0][:3] for line in lines[3:6]] == ["c1x", "c2x", "c3x"]
    assert max(map(len, lines)) <= COLUMNS


def test_a_wide_table_of_many_rows_names_the_columns_that_it_loses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(grid(9, 14, width=9))
    out = capsys.readouterr().out
    assert "columns left out (--full): c" in out and max(map(len, out.splitlines())) <= COLUMNS


def test_many_tables_leave_the_last_ones_for_full(capsys: pytest.CaptureFixture[str]) -> None:
    show(*[grid(20, 3) for _ in range(9)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES and lines[-1].startswith("More with --full: a title; a title")


def test_what_users_wrote_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    show(Table("\x1b[2Jtitle", ("a", "b"), (("\x1b[31mred[/]", "[bold]x"),)))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[bold]x" in out and "[/]" in out
