"""Reads a page as its reader would: every block in order, in one folder and one Python.

A block is run by its language. `python`: in one namespace for the page; by vLLM's interpreter where
it imports what only that has. `sh`: line by line; `trimtab` through the real command line, servers
started and waited for, everything else by the table `PROGRAMS` or refused. `yaml` and
`json`: parsed, loaded where they are a behavior. `text` is read only. A block with a title is a file of
that name; a `text` block with the title `output` must stand in what the block before it printed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trimtab import cli
from trimtab.behaviors.file import load_behavior

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
OUTPUT = "output"
PATIENCE = 600.0
# What only another program's environment has: modules and engines, wherever a block names them.
ELSEWHERE = {"vllm": "vllm", "openai": "vllm"}
# Syntax of a shell that is not imitated; a page can do without.
SHELL = {"|", "||", "&&", "&", ">", ">>", "<", ";"}


@dataclass(frozen=True)
class Block:
    """One fenced block and the line that it starts in."""

    language: str
    title: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page in order."""
    return [
        Block(m["language"], m["title"] or "", m["body"], text.count("\n", 0, m.start("body")) + 1)
        for m in FENCE.finditer(text)
    ]


def commands(body: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block as words: continued lines joined, comments off."""
    held = ""
    for line in body.splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1]
            continue
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quotation that goes on
            held += "\n"
            continue
        held = ""
        if words:
            yield words
    assert not held, f"an unfinished command: {held}"


def _declared_extra(reader: Reader, words: list[str]) -> None:
    """The environment of the tests is what pip makes; the extras that are named must exist."""
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    known = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
    for word in words:
        for extra in re.findall(r"\[([\w,-]+)\]", word):
            assert set(extra.split(",")) <= set(known), f"no extra {extra}"


def _declared_target(reader: Reader, words: list[str]) -> None:
    """Run elsewhere: by make itself. The target must exist."""
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _nothing(reader: Reader, words: list[str]) -> None:
    """Leads into the environment that the tests run in."""


def _curl(reader: Reader, words: list[str]) -> None:
    reader.run(["curl", "--silent", "--show-error", "--fail-with-body", *words[1:]])


def _lm_eval(reader: Reader, words: list[str]) -> None:
    reader.run([sys.executable, "-m", *words])


def _inspect(reader: Reader, words: list[str]) -> None:
    reader.run([str(Path(reader.interpreter("inspect")).with_name("inspect")), *words[1:]])


@dataclass(frozen=True)
class Program:
    """What a line that starts with these words does here, and why that is enough."""

    run: Callable[[Reader, list[str]], None]
    why: str


def program(words: list[str]) -> Program:
    for length in (3, 2, 1):
        found = PROGRAMS.get(" ".join(words[:length]))
        if found is not None:
            return found
    raise AssertionError(f"nobody knows how to run {' '.join(words)}")


@dataclass
class Reader:
    """A reader of one page, with a folder and a Python of their own.

    Attributes:
        folder: Where everything is run; the process must be in it.
        server: What the page started last.
        printed: By the block before.
    """

    folder: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    server: subprocess.Popen[bytes] | None = None
    printed: str = ""

    def read(self, text: str) -> int:
        """Run every block of a page.

        Returns:
            How many blocks did something.
        """
        ran = 0
        try:
            for block in blocks(text):
                try:
                    ran += self.block(block)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"line {block.line}: {error!r}") from error
        finally:
            self.stop()
        return ran

    def block(self, block: Block) -> bool:
        """Run one block; whether there was something to run."""
        if block.language == "text":
            if block.title == OUTPUT:
                for line in block.body.splitlines():
                    assert line.strip() in self.printed, f"{line!r} is not in\n{self.printed}"
            return block.title == OUTPUT
        run = {
            "python": self.python,
            "sh": self.shell,
            "yaml": self.data,
            "json": self.data,
        }.get(block.language)
        assert run is not None, f"a block of the language {block.language!r}"
        heard = Tee(sys.stdout)
        with redirect_stdout(heard):
            run(block)
        self.printed = heard.getvalue()
        return True

    def data(self, block: Block) -> None:
        """Parse data; a file of that title is made, and loaded where it is a behavior."""
        if block.language == "yaml":
            found = yaml.safe_load(block.body)
            behavior = isinstance(found, dict) and "toward" in found
        elif block.title.endswith(".jsonl"):
            found = [json.loads(line) for line in block.body.splitlines()]
            behavior = "side" in found[-1]
        else:
            found, behavior = json.loads(block.body), False
        if block.title or behavior:
            path = self.folder / (block.title or "behavior.yaml")
            path.write_text(block.body)
            if behavior:
                load_behavior(path)

    def python(self, block: Block) -> None:
        """Run Python, in the page's own namespace or by the interpreter that has the modules."""
        if block.title:  # a file, which some program of the page reads
            (self.folder / block.title).write_text(block.body)
            return None
        source = "\n" * (block.line - 1) + block.body
        code = compile(source, "page", "exec")
        for name, environment in ELSEWHERE.items():
            if re.search(rf"\b{name}\b", block.body):
                path = self.folder / f"block_{block.line}.py"
                path.write_text(block.body)
                return self.run([self.interpreter(environment), str(path)])
        exec(code, self.namespace)
        return None

    def shell(self, block: Block) -> None:
        """Run the commands of a shell block in turn."""
        for words in commands(block.body):
            assert not SHELL & set(words), f"a shell's own syntax in {words}"
            program(words).run(self, words)

    def trimtab(self, words: list[str]) -> None:
        """Run a command in this process, as its entry point does."""
        if "--engine" in words and words[words.index("--engine") + 1] in ELSEWHERE:
            return self.run([self.interpreter("vllm"), "-m", *words])
        # A process of its own would take these with it.
        hook, environment, code = sys.excepthook, dict(os.environ), None
        try:
            cli.main(words[1:])
        except SystemExit as left:
            code = left.code
        finally:
            sys.excepthook = hook
            os.environ.clear()
            os.environ.update(environment)
        assert not code, f"exit code {code} of {shlex.join(words)}"
        return None

    def run(self, command: list[str]) -> None:
        """Run another program to its end."""
        done = subprocess.run(
            command,
            env=self.environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        sys.stdout.write(done.stdout)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"

    @staticmethod
    def interpreter(environment: str) -> str:
        """The Python of an environment that `make test-interop` keeps."""
        return str(Path(os.environ["TRIMTAB_INTEROP"]) / environment / "bin" / "python")

    def environment(self) -> dict[str, str]:
        """Make these sources and their entry point known, as an installation would; small caches."""
        info = self.folder.parent / f"{self.folder.name}-plugin" / "trimtab-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trimtab\nVersion: 0\n")
        entry = "[vllm.general_plugins]\ntrimtab = trimtab.serve.plugin:register\n"
        (info / "entry_points.txt").write_text(entry)
        return os.environ | {
            "PYTHONPATH": f"{ROOT / 'src'}:{info.parent}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def serve(self, command: list[str], words: list[str], port: int, path: str) -> None:
        """Start a server with the page's own arguments; it lives until the next or the page's end."""
        self.stop()
        if "--port" in words:
            port = int(words[words.index("--port") + 1])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))  # somebody else's server would answer for ours
        log = self.folder / "server.log"
        with log.open("w") as said:
            self.server = subprocess.Popen(
                command,
                env=self.environment(),
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        last = time.monotonic() + PATIENCE
        while time.monotonic() < last and self.server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(log.read_text()[-4000:])

    def stop(self) -> None:
        """Stop the server, if there is one."""
        server, self.server = self.server, None
        if server is None or server.poll() is not None:
            return
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def write(self, text: str, /) -> int:
        self.other.write(text)
        return super().write(text)


def _vllm(reader: Reader, words: list[str]) -> None:
    # The CPU wheel's own command looks for its version under another name: its module is the same.
    command = [reader.interpreter("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    reader.serve([*command, *words[2:]], words, 8000, "/health")


def _trimtab_serve(reader: Reader, words: list[str]) -> None:
    if "--dry-run" in words:
        return reader.trimtab(words)
    return reader.serve([reader.interpreter("vllm"), "-m", *words], words, 8000, "/health")


def _studio(reader: Reader, words: list[str]) -> None:
    reader.serve([sys.executable, "-m", *words], words, 7860, "/")


PROGRAMS = {
    "trimtab": Program(Reader.trimtab, "run in this process"),
    "trimtab serve": Program(_trimtab_serve, "started, asked by what follows, stopped"),
    "trimtab studio": Program(_studio, "started and stopped; check_studio.py uses it"),
    "vllm serve": Program(_vllm, "started, asked by what follows, stopped"),
    "curl": Program(_curl, "run"),
    "lm_eval": Program(_lm_eval, "run by this environment"),
    "inspect": Program(_inspect, "run by the environment that has Inspect"),
    "pip install": Program(_declared_extra, "the environment of the tests is what it makes"),
    "python3 -m venv": Program(_nothing, "the tests run in such an environment"),
    ". .venv/bin/activate": Program(_nothing, "the tests run in such an environment"),
    "make": Program(_declared_target, "make test, make test-interop and the tests of each are CI"),
}
