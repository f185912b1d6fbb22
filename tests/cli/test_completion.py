"""Shell completion: what a shell asks, and what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import cli
from trimtab.behaviors import built_in_names

SHELLS = {
    "bash": lambda line: {"COMP_WORDS": line, "COMP_CWORD": str(len((line + "x").split()) - 1)},
    "zsh": lambda line: {"_TYPER_COMPLETE_ARGS": line},
    "fish": lambda line: {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    },
}
ASKED = {
    "trimtab insp": ["inspect"],
    "trimtab audit har": ["harbor"],
    "trimtab audit harbor re": ["refusal", "register"],
    "trimtab audit harbor ": built_in_names(),
    "trimtab export harbor v.safetensors --to g": ["gguf"],
    "trimtab bake --pl": ["--plan"],
}


@pytest.fixture(autouse=True)
def any_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the shell instead of looking for the one that runs the tests."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")


def left(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("line", ASKED)
def test_a_shell_is_told_how_a_line_goes_on(
    shell: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_TRIMTAB_COMPLETE", f"complete_{shell}")
    for name, value in SHELLS[shell](line).items():
        monkeypatch.setenv(name, value)
    assert left() == 0
    told = capsys.readouterr().out
    for word in ASKED[line]:
        assert word in told
    if shell == "bash":
        assert told.split() == ASKED[line]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_that_is_shown_calls_trimtab(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("--show-completion", shell) == 0
    told = capsys.readouterr().out
    assert f"_TRIMTAB_COMPLETE=complete_{shell}" in told


def test_it_is_installed_where_bash_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert left("--install-completion", "bash") == 0
    script = tmp_path / ".bash_completions" / "trimtab.sh"
    assert "_TRIMTAB_COMPLETE" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
