"""What the documents tell a reader to type: commands that parse, Python that compiles, links that lead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import cast

import pytest
import typer

from trimtab.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(trimtab .*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
# Words in a document that stand for the reader's own.
PLACEHOLDER = re.compile(r"[<>|]|\.\.\.|^\[")
# What the command line raises for an option or argument that it does not know.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def commands(text: str) -> list[str]:
    """Every `trimtab ...` line of a page's code, continued lines joined, comments off."""
    blocks = [body for _, body in FENCE.findall(text)]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += INDENTED.findall(FENCE.sub("", text))
    found = []
    for line in lines:
        line = line.strip().removeprefix("$ ")
        if line.startswith("trimtab ") and not any(map(PLACEHOLDER.search, line.split())):
            found.append(line)
    return found


def parsed(line: str) -> None:
    """Parse a command as the command line does, without running it."""
    words = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    known = group.commands  # pyright: ignore[reportAttributeAccessIssue]
    assert words[0] in known or words[0].startswith("-"), f"no command {words[0]}"
    if words[0] in known and "--help" not in words:
        known[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page: Path) -> None:
    for line in commands(page.read_text()):
        try:
            parsed(line)
        except UsageError as error:
            pytest.fail(f"{line}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_of_a_page_compiles(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        if language == "python":
            compile(body, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        assert (page.parent / target).exists(), target


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(UsageError):
        parsed("trimtab find harbor refusal -o v --no-such-option 3")
    assert sum(len(commands(page.read_text())) for page in PAGES) > 40
