"""What the documents tell a reader to type: commands that parse, Python that compiles, links that lead.

`tests/interop/check_docs.py` runs every block; that it can fail is tested here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import typer

import trimtab
from interop.check_docs import PAGES
from interop.reader import FENCE, ROOT, Block, Reader, blocks, commands, program
from trimtab.cli.app import app

LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
# An indented block has no language, so nobody would know how to run it.
INDENTED = re.compile(r"^\n {4}(?![\s*|-]|\d+\.)", re.MULTILINE)
# What the command line raises for an option or argument that it does not know.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def shell_commands(text: str) -> list[list[str]]:
    """Every command of a page's shell blocks."""
    return [
        words for block in blocks(text) if block.language == "sh" for words in commands(block.body)
    ]


def parsed(words: Sequence[str]) -> None:
    """Parse a command as the command line does, without running it."""
    name, *given = words[1:]
    group = typer.main.get_command(app)
    known = group.commands  # pyright: ignore[reportAttributeAccessIssue]
    assert name in known or name.startswith("-"), f"no command {name}"
    if name in known and "--help" not in given:
        known[name].make_context(name, given)


@EVERY_PAGE
def test_every_command_of_a_page_parses(page: Path) -> None:
    for words in shell_commands(page.read_text()):
        assert program(words)
        if words[0] == "trimtab":
            try:
                parsed(words)
            except UsageError as error:
                pytest.fail(f"{' '.join(words)}\n{error}")


@EVERY_PAGE
def test_every_block_of_a_page_has_a_language_and_its_python_compiles(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n```") == 2 * len(blocks(text)), "a fence that no block belongs to"
    assert not INDENTED.search(FENCE.sub("", text)), "an indented block"
    for block in blocks(text):
        assert block.language in ("python", "sh", "yaml", "json", "text"), block
        if block.language == "python":
            compile(block.body, str(page), "exec")


@EVERY_PAGE
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        assert (page.parent / target).exists(), target


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(UsageError):
        parsed("trimtab find harbor refusal -o v --no-such-option 3".split())
    assert sum(len(shell_commands(page.read_text())) for page in PAGES) > 60


BROKEN = {
    "python that raises": ("```python\nx = 1\n```\n```python\ny = x + z\n```\n", "NameError"),
    "a refused command": ("```sh\ntrimtab inspect nowhere.safetensors\n```\n", "exit code 2"),
    "an unknown option": ("```sh\ntrimtab doctor --no-such-option\n```\n", "exit code 2"),
    "an unknown program": ("```sh\nrm -rf refusing-harbor\n```\n", "nobody knows how"),
    "a shell's syntax": ("```sh\ntrimtab --version | cat\n```\n", "shell's own syntax"),
    "no language": ("```\ntrimtab doctor\n```\n", "of the language ''"),
    "no such extra": ("```sh\npip install 'trimtab[everything]'\n```\n", "no extra everything"),
    "no such target": ("```sh\nmake coffee\n```\n", "coffee"),
    "another output": (
        '```sh\ntrimtab --version\n```\n```text title="output"\nno version\n```\n',
        "is not in",
    ),
    "a behavior of one side": ("```yaml\nname: x\ntoward: [a]\n```\n", "no 'away'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_block_fails_with_its_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, why = BROKEN[name]
    with pytest.raises(AssertionError, match=f"line [0-9]+: (?s:.*){re.escape(why)}"):
        Reader(tmp_path).read(text)


def test_blocks_run_in_order_in_one_folder_and_one_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (
        '```yaml title="polite.yaml"\ntoward: [a, b, c]\naway: [d, e, f]\n'
        "judge: {kind: phrases, toward: [x], away: [y]}\n```\n"
        '```python\nimport trimtab as tt\nname = tt.behavior("polite.yaml").name\n```\n'
        '```python\nprint(name)\n```\n```text title="output"\npolite\n```\n'
        '```sh\ntrimtab \\\n  --version  # it\'s the "installed" one\n```\n'
        '```text title="output"\ntrimtab\n```\n```text\nanything\n```\n'
    )
    assert Reader(tmp_path).read(page) == 6


def test_quotations_go_over_lines() -> None:
    body = "curl -d '{\n  \"a\": 1}' x \\\n  y # what's that\n\n# only a comment\ntrimtab doctor\n"
    assert list(commands(body)) == [
        ["curl", "-d", '{\n  "a": 1}', "x", "y"],
        ["trimtab", "doctor"],
    ]
    assert blocks("a\n```sh\nb\n```\n") == [Block("sh", "", "b\n", 3)]


def test_every_public_name_and_method_says_what_it_does() -> None:
    """The linter no longer asks methods for a sentence; the public ones owe it all the same."""
    silent: list[str] = []
    for name in trimtab.__all__:
        thing = getattr(trimtab, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if not inspect.getdoc(thing):
            silent.append(name)
        if inspect.isclass(thing):
            silent += [
                f"{name}.{method}"
                for method, value in vars(thing).items()
                if not method.startswith("_")
                and (inspect.isfunction(value) or isinstance(value, property | classmethod))
                and not inspect.getdoc(getattr(thing, method))
            ]
    assert not silent
