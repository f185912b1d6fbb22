"""What stands around the code agrees with it: citation, workflows, hooks, issue forms, the site's pages."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import trimtab as tt

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == tt.__version__
    assert f'license = "{cited["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_workflows_make_targets_that_exist_and_pin_their_actions() -> None:
    made = set()
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            made |= set(re.findall(r"^make ([\w-]+)$", step.get("run", ""), re.M))
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))
    assert {"test", "lint", "docs"} == made
    assert all(f"\n{target}: $(STAMP)\n" in MAKEFILE for target in made)


def test_workflows_test_every_python_that_is_promised() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    tested = matrix["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
    assert tested == promised


def test_the_hooks_are_the_lint_target() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [each["repo"] for each in repositories] == ["local"]
    hooks = {hook["id"]: hook for hook in repositories[0]["hooks"]}
    assert set(hooks) == set(re.findall(r"^\t\$\(BIN\)/(ruff|basedpyright)", MAKEFILE, re.M))
    assert all(hook["language"] == "system" for hook in hooks.values())


def test_issue_forms_ask_for_something() -> None:
    for name in ("bug.yml", "new_method.yml"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert form["name"] and form["description"]
        assert len({part["id"] for part in asked}) == len(asked)
        assert any(part.get("validations", {}).get("required") for part in asked)


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(named) == pages and len(named) == len(pages)
