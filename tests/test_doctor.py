"""`trimtab doctor`."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trimtab.cli.app import app
from trimtab.doctor import EXTRAS, diagnose


def test_versions_and_extras_are_those_installed() -> None:
    found = diagnose()
    assert found.versions["torch"] == metadata.version("torch")
    known = {extra.name: extra.version for extra in found.extras}
    assert set(known) == set(EXTRAS)
    assert known["peft"] == metadata.version("peft")
    assert found.cores >= 1 and (found.memory_gib or 1) > 0


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "peft", ("no_such_module", "something"))
    table = str(diagnose().table())
    assert "not installed" in table and "trimtab[peft]" in table.replace("\n", "")


def test_extras_are_those_of_the_package() -> None:
    declared = set(metadata.metadata("trimtab").get_all("Provides-Extra") or [])
    assert set(EXTRAS) <= declared


def test_the_command_imports_no_extra(tmp_path: Path) -> None:
    before = set(sys.modules)
    out = tmp_path / "d.json"
    result = CliRunner().invoke(app, ["doctor", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["cores"] >= 1
    assert not {"gguf", "vllm", "lm_eval", "mkdocs"} & (set(sys.modules) - before)
