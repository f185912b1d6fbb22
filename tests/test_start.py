"""How Trimtab starts: public names and the command line's help wait for nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from inspect import getsource
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import typer

import trimtab as tt
from trimtab.cli.app import app
from trimtab.engine import ENGINES
from trimtab.evaluation.readout import AGGREGATORS

PLACES: dict[str, str] = vars(tt)["_PLACES"]
SHADOWED = sorted(
    name
    for name, place in PLACES.items()
    if ":" in place
    and any((Path(tt.__path__[0]) / found).exists() for found in (name, f"{name}.py"))
)


def typed_places() -> dict[str, str]:
    """The names that type checkers see, and where."""
    (block,) = (
        node
        for node in ast.parse(Path(str(tt.__file__)).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        # `from trimtab import harbor` names a module, all others something in one.
        alias.asname or alias.name: (
            f"trimtab.{alias.name}" if node.module == "trimtab" else f"{node.module}:{alias.name}"
        )
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_what_type_checkers_see_is_what_is_there() -> None:
    assert typed_places() == PLACES
    assert sorted(PLACES) == sorted(tt.__all__)
    assert set(tt.__all__) <= set(dir(tt))


@pytest.mark.parametrize("name", PLACES)
def test_a_public_name_is_what_its_place_holds(name: str) -> None:
    assert getattr(tt, name) is resolve_name(PLACES[name])
    assert isinstance(getattr(tt, name), ModuleType) == (name == "harbor")


def test_an_unknown_name_is_refused() -> None:
    unknown = "fnid"
    with pytest.raises(AttributeError, match="module 'trimtab' has no attribute 'fnid'"):
        getattr(tt, unknown)


def test_no_public_function_has_the_name_of_a_submodule() -> None:
    """Importing the submodule would take the function's place."""
    assert SHADOWED == []


def test_a_star_imports_everything() -> None:
    names: dict[str, Any] = {}
    exec("from trimtab import *", names)
    assert {name: getattr(tt, name) for name in tt.__all__}.items() <= names.items()


def modules_by_name() -> None:
    import importlib

    module = importlib.import_module("trimtab.methods")
    import trimtab as tt
    from trimtab.methods import find, register

    assert module.__name__ == "trimtab.methods" and module.register is register
    assert tt.find is find is module.find


def harbor_after_its_parts() -> None:
    import trimtab.harbor.lexicon
    from trimtab import harbor
    from trimtab.models import generation

    assert harbor is trimtab.harbor and harbor.path().is_dir()
    assert generation.__name__ == "trimtab.models.generation"


def the_built_in_judge_of_measure_alone() -> None:
    from trimtab.behaviors.file import load_behavior
    from trimtab.evaluation import coherence_for, judge_for

    asked, refusal = load_behavior("refusal").toward[0].prompt, load_behavior("refusal")
    assert len(judge_for(refusal)([asked], ["Boats."])) == 1
    assert len(coherence_for(refusal)(["Boats."])) == 1


def a_judge_of_the_user_goes_first() -> None:
    from trimtab.behaviors.file import load_behavior
    from trimtab.evaluation import Verdict, judge_for, register_judge

    @register_judge("harbor")
    def own(behavior: Any, options: Any) -> Any:
        return lambda prompts, answers: [Verdict(0.5, 0.25) for _ in answers]

    import trimtab.harbor.scoring  # noqa: F401

    assert judge_for(load_behavior("refusal"))([""], ["No."]) == [Verdict(0.5, 0.25)]


ORDERS = (
    modules_by_name,
    harbor_after_its_parts,
    the_built_in_judge_of_measure_alone,
    a_judge_of_the_user_goes_first,
)
# One process for all of them: torch is imported once, Trimtab each time again.
FRESH = """
import json, sys, traceback
from typing import Any
import torch, transformers
failed = {}
for name, source in json.loads(sys.stdin.read()).items():
    for module in [m for m in sys.modules if m.partition(".")[0] == "trimtab"]:
        del sys.modules[module]
    scope = {"Any": Any}
    exec(source, scope)
    try:
        scope[name]()
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed_orders() -> dict[str, str]:
    sources = json.dumps({order.__name__: getsource(order) for order in ORDERS})
    return json.loads(python(FRESH, sources))


@pytest.mark.parametrize("order", [order.__name__ for order in ORDERS])
def test_names_mean_the_same_in_any_order_of_imports(
    order: str, failed_orders: dict[str, str]
) -> None:
    assert order not in failed_orders, failed_orders[order]


COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
LINES = [
    *(["--help"], ["--version"], []),
    *([command, "--help"] for command in COMMANDS),
    *(["find", "harbor"], ["find", "--no-such-option"], ["no-such-command"]),
]
COMPLETED = {
    "trimtab fi": "find",
    "trimtab find har": "harbor",
    "trimtab find harbor ref": "refusal",
    "trimtab export harbor v --to gg": "gguf",
    "trimtab tune --bud": "--budget",
}
STARTED = """
import json, sys
import trimtab
from trimtab.cli.app import app
from typer.testing import CliRunner

lines, completed = json.loads(sys.stdin.read())
runner, codes, told = CliRunner(), [], []
for line in lines:
    codes.append(runner.invoke(app, line, prog_name="trimtab").exit_code)
for line in completed:
    asked = {
        "_TRIMTAB_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    told.append(runner.invoke(app, [], env=asked, prog_name="trimtab").output.split())
print(json.dumps([codes, told, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
HEAVY = {
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("numpy", "scipy", "plotly", "jinja2", "gradio", "ray", "peft"),
}


def python(script: str, given: str) -> str:
    """What a new process prints last."""
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, input=given, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]


def test_help_usage_errors_and_completion_import_nothing_heavy() -> None:
    codes, told, modules = json.loads(python(STARTED, json.dumps([LINES, list(COMPLETED)])))
    assert len(COMMANDS) > 10
    assert dict(zip(map(" ".join, LINES), codes, strict=True)) == {
        " ".join(line): 0 if line and line[-1] in ("--help", "--version") else 2 for line in LINES
    }
    assert told == [[word] for word in COMPLETED.values()]
    assert "trimtab" in modules and not HEAVY & set(modules)


def test_importing_trimtab_imports_nothing_of_its_own_or_of_others() -> None:
    loaded = python("import sys, trimtab; print(*sys.modules)", "").split()
    assert [name for name in loaded if name.partition(".")[0] == "trimtab"] == ["trimtab"]
    assert not (HEAVY | {"pydantic", "typer", "rich"}) & set(loaded)


def test_what_help_repeats_is_so() -> None:
    """The command line says these itself, for the modules that define them are heavy."""

    def option(command: str, name: str) -> Any:
        return next(p for p in COMMANDS[command].params if p.name == name)

    assert option("audit", "aggregator").help.endswith(f": {', '.join(AGGREGATORS)}.")
    assert all(name in option("measure", "engine").help for name in ENGINES)


QUIET = """
import os, sys
os.environ.pop("GOMP_SPINCOUNT", None)
from trimtab.cli import main
try:
    main(["--version"])
except SystemExit:
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
"""


def test_waiting_threads_are_told_to_spin_little_before_torch_reads_it() -> None:
    assert python(QUIET, "").split() == ["1000", "False"]
