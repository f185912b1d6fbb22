"""The house stands as docs/architecture.md draws it: computed from the imports themselves."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import trimtab as tt

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tt.__path__[0])
Graph = dict[str, set[str]]


@cache
def imports() -> Graph:
    """File -> the files that it imports, anywhere in it: at its top, in a function, for types."""
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
    }
    graph: Graph = {}
    for name, path in paths.items():
        asked = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked |= {f"{node.module}.{alias.name}" for alias in node.names}
        found = {file for each in asked if (file := owner(each, paths))}
        graph[name] = found - {name}
    return graph


def owner(name: str, paths: Mapping[str, Path]) -> str | None:
    """The file that defines a dotted name."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return name or None


def room(file: str) -> str:
    return (file.split(".") + ["__init__"])[1]


def rooms() -> Graph:
    graph: Graph = {room(file): set() for file in imports()}
    for file, others in imports().items():
        graph[room(file)] |= {room(other) for other in others} - {room(file)}
    return graph


def order(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


def floors() -> dict[str, int]:
    graph, floor = rooms(), {}
    for name in order(graph):
        floor[name] = 1 + max((floor[other] for other in graph[name]), default=0)
    return floor


def test_no_circle_of_files_or_rooms() -> None:
    assert len(order(imports())) > 300
    assert len(order(rooms())) > 20


def test_at_most_twelve_floors() -> None:
    found = {name: floor for name, floor in floors().items() if not name.startswith("__")}
    assert max(found.values()) <= 12, found


def test_at_most_nine_loose_files() -> None:
    loose = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(loose) <= 9, loose


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [name for name in rooms() if f"`{name}`" not in page and not name.startswith("__")]
    assert not missing


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
    )


def test_the_contract_holds_and_fails_on_an_import_that_goes_up(tmp_path: Path) -> None:
    copy = tmp_path / "src" / "trimtab"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.pyc"))
    kept = linted(tmp_path)
    assert kept.returncode == 0, kept.stdout
    file = copy / "results" / "tables.py"
    file.write_text(file.read_text() + "\n\ndef _up() -> None:\n    import trimtab.methods.find\n")
    broken = linted(tmp_path)
    assert broken.returncode == 1 and "results is not allowed to import" in broken.stdout


def test_a_class_name_means_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}
