"""What a command prints fits a screen, conclusions first; --full prints everything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
import trimtab.cli  # noqa: F401, registers the commands
from trimtab.cli.app import app
from trimtab.cli.screen import COLUMNS, LINES, show
from trimtab.results.tables import Table

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
