"""Shell and Python agree: every command offers its public function's options, with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import trimtab as tt
import trimtab.cli  # noqa: F401, registers the commands
from trimtab.arguments import sign_of, signs_of
from trimtab.cli.app import app
from trimtab.errors import TrimtabError
from trimtab.prompts.pipeline.task import Settings


def test_one_word_for_a_direction() -> None:
    assert [signs_of(word) for word in ("toward", "away", "both")] == [(1,), (-1,), (1, -1)]
    assert [sign_of(word) for word in ("toward", "away")] == [1, -1]
    with pytest.raises(TrimtabError, match="'up'[^$]*use toward, away or both"):
        signs_of("up")
    with pytest.raises(TrimtabError, match="'both'[^$]*use toward or away"):
        sign_of("both")


@pytest.mark.parametrize("command", ["tune", "laws", "levers", "close-gap"])
def test_the_old_word_is_refused(command: str) -> None:
    refused = CliRunner().invoke(app, [command, "harbor", "refusal", "--away"])
    assert refused.exit_code == 2 and "No such option: --away" in refused.stderr


# Commands whose function has another name, or is no function of `tt`.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "levers": tt.compare_levers,
    "generate": tt.LanguageModel.generate,
}
NO_FUNCTION = {
    "demo": "writes a report of the other commands",
    "doctor": "about the installation",
    "export": "one writer per format, trimtab.export",
    "inspect": "prints what load_steering and the files' headers give",
    "serve": "starts vLLM",
    "studio": "starts the browser app",
}
# What a command line needs and Python has otherwise: files, the screen, the choice of an engine.
SHELL = {"out", "report", "json", "full", "engine", "address", "workers"}
# Levers come from files: their strength is `lever.at(m)` in Python.
SHELL_OF = {
    "find": {"strength", "each_layer", "sparsify"},
    "tune": {"sparsify"},
    "bake": {"strength", "plan"},
    "convert": {"strength"},
    "measure": {"strength"},
    "tasks": {"strength"},
    "generate": {"strength", "system", "with"},
    # The behavior gives both of its prompts in Python; what --along and --states do are other functions.
    "search": {"reference", "along", "states"},
    # Gives `sets`, a value that only Python can hold.
    "audit": {"learn_sets"},
}
# What no command line can say: values and callables.
PYTHON = {"engine", "progress", "unsteered", "constraints", "options", "lm", "say", "self"}
PYTHON_OF = {
    "find": {"site", "split"},
    "measure": {"split"},
    "audit": {"baked", "sets"},
    "levers": {"found", "effort", "rounds"},
    "convert": {"train_requests"},
    "bake": {"prompts"},
    "search": {"settings", "judge", "separator", *vars(Settings())},
    "generate": {"use_cache"},
}
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


def function_of(command: str) -> Callable[..., Any]:
    return FUNCTIONS.get(command) or getattr(tt, command.replace("-", "_"))


def offered(command: str) -> dict[str, Any]:
    """The options of a command, by the name that is typed, with their defaults."""
    return {
        max(each.opts, key=len).removeprefix("--").replace("-", "_"): each.default
        for each in COMMANDS[command].params
        if each.param_type_name == "option" and not each.required
    }


def taken(command: str) -> dict[str, Any]:
    """The optional arguments of a function, `search`'s settings among them, with their defaults."""
    given = signature(function_of(command)).parameters.values()
    found = {each.name: each.default for each in given if each.default is not each.empty}
    if command == "search":
        found |= vars(Settings())
    return found


def test_every_command_has_a_function_or_a_reason() -> None:
    functions = {*FUNCTIONS, *(name.replace("_", "-") for name in tt.__all__)}
    missing = set(COMMANDS) - functions
    assert missing == set(NO_FUNCTION)


def differences(command: str) -> dict[str, Any]:
    """What only one side knows, and what has two defaults."""
    shell, python = offered(command), taken(command)
    required = {each.name for each in COMMANDS[command].params if each.param_type_name == "argument"}
    both = shell.keys() & python.keys() - SHELL
    return {
        "only the command": shell.keys() - python.keys() - SHELL - SHELL_OF.get(command, set()),
        "only the function": python.keys()
        - (shell.keys() | required | PYTHON | PYTHON_OF.get(command, set())),
        "defaults": {n: (shell[n], python[n]) for n in both if shell[n] != python[n]},
    }


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NO_FUNCTION])
def test_a_command_has_its_functions_options_and_defaults(command: str) -> None:
    assert not any(differences(command).values()), differences(command)
    assert SHELL_OF.get(command, set()) <= offered(command).keys() - taken(command).keys()


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {each.name: each for each in COMMANDS["tune"].params}
    monkeypatch.setattr(options["budget"], "default", 0.4)
    monkeypatch.setattr(options["direction"], "opts", ["--away"])
    assert differences("tune") == {
        "only the command": {"away"},
        "only the function": {"direction"},
        "defaults": {"budget": (0.4, 0.5)},
    }
