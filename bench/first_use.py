"""A new user's path, timed: clone, install, then the tutorial line by line, to a served answer.

The commands are those of docs/tutorial.md, read from the page. `--vllm PYTHON` serves the baked
model with that interpreter's vLLM; without it the path ends in transformers. `--installed` leaves
out clone and installation and uses the environment that runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from common import emit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from interop.reader import blocks, commands  # noqa: E402

PATIENCE = 600.0
# What the tutorial says is put into an environment, the installation has put there.
INSTALL = "pip"


def tutorial(root: Path) -> list[list[str]]:
    """The commands of the tutorial, as words, without its line about installing."""
    page = (root / "docs" / "tutorial.md").read_text()
    found = [
        words for block in blocks(page) if block.language == "sh" for words in commands(block.body)
    ]
    return [words for words in found if words[0] != INSTALL]


def timed(command: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run one command to its end: its seconds and what it said."""
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}")
    return {"command": shlex.join(command), "seconds": seconds, "said": done.stdout}


def wait(server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers on the port of the tutorial."""
    last = time.monotonic() + PATIENCE
    while time.monotonic() < last and server.poll() is None:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(log.read_text()[-4000:])


def answer(said: str) -> str:
    """The model's words in what a command printed."""
    try:
        return json.loads(said)["choices"][0]["message"]["content"]
    except json.JSONDecodeError:
        return said.strip()


def walk(root: Path, work: Path, environment: dict[str, str], vllm: Path | None) -> list[dict]:
    """Type the tutorial; a row for each line, with the answer where the line asks for one."""
    rows: list[dict] = []
    server = None
    try:
        for words in tutorial(root):
            if words[0] in ("vllm", "curl") and vllm is None:
                continue
            if words[0] == "vllm":
                log = work / "server.log"
                # As `trimtab serve` does: the CPU wheel's own command does not find its version.
                module = "vllm.entrypoints.openai.api_server"
                command = [str(vllm), "-m", module, "--model", *words[2:]]
                started = time.perf_counter()
                with log.open("w") as said:
                    server = subprocess.Popen(
                        command,
                        cwd=work,
                        env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1"},
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                    )
                wait(server, log)
                seconds = time.perf_counter() - started
                rows.append({"command": shlex.join(words), "seconds": seconds})
                continue
            row = timed(words, work, environment)
            said = str(row.pop("said"))
            if words[0] == "curl" or words[1] == "generate":
                row["answer"] = answer(said)
            rows.append(row)
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    return rows


def reached(rows: list[dict], words: str) -> float:
    """Seconds from the start to the end of the last line with these words."""
    last = max(n for n, row in enumerate(rows) if words in row["command"])
    return sum(row["seconds"] for row in rows[: last + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument(
        "--vllm", type=Path, default=None, help="the Python of an environment with vLLM"
    )
    parser.add_argument("--installed", action="store_true", help="do not clone and install")
    asked = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        root, binaries = ROOT, Path(sys.executable).parent
        if not asked.installed:
            root = work / "trimtab"
            binaries = root / ".venv" / "bin"
            clone = ["git", "clone", "--quiet", str(ROOT), str(root)]
            for command, folder in ((clone, work), (["make", ".venv/.installed"], root)):
                row = timed(command, folder, dict(os.environ))
                rows.append({"command": command[0] + " " + command[1], "seconds": row["seconds"]})
        environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        rows += walk(root, work, environment, asked.vllm)
    first = reached(rows, "--with")
    install = sum(row["seconds"] for row in rows if row["command"].startswith(("git", "make")))
    summary = {
        "name": "a new user",
        "installation_s": install,
        "clone_to_first_steered_answer_s": first,
        "clone_to_baked_answer_s": reached(rows, "generate refusing-harbor"),
        "tutorial_s": sum(row["seconds"] for row in rows) - install,
        "tutorial_over_three_minutes": (sum(row["seconds"] for row in rows) - install) / 180,
    }
    if asked.vllm is not None:
        summary["clone_to_served_answer_s"] = reached(rows, "curl")
    emit("first_use", [summary, *rows], asked.json)


if __name__ == "__main__":
    main()
