"""A journal of long work: one JSON line per finished step, so that killed work resumes.

The first line is a header that says what is being done. A journal is only taken up by work with the
same header. Lines reach the disk before `add` returns; a last line that was cut off is dropped, and
its step is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

FORMAT = "trimtab.journal"
VERSION = 1


class Notes:
    """Finished steps that are only kept in memory: what work writes into when it has no file.

    Attributes:
        entries: In the order of writing.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self.entries: list[dict[str, Any]] = [dict(entry) for entry in entries]

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep one finished step, as JSON would give it back."""
        self.entries.append(json.loads(json.dumps(entry)))


class Journal(Notes):
    """An append-only file of JSON objects; one process writes it at a time.

    Attributes:
        path: The file.
        entries: What it holds, in the order of writing.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        """Take up a journal, or start one.

        Args:
            path: The file; its folder is made.
            header: What is being done, JSON-able; floats may be infinite.

        Raises:
            TrimtabError: The file is of other work, is no journal, is damaged, or cannot be written.
        """
        self.path = Path(path)
        self._header = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **header}))
        lines = self._lines()
        if lines:
            self._compare(lines[0])
        super().__init__(lines[1:])
        if not lines:
            self._append(self._header)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one finished step; it is on the disk when this returns.

        Raises:
            TrimtabError: The file cannot be written.
        """
        self._append(entry)
        super().add(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(_line(entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable(str(error), "choose a file in a folder you own") from error

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines of the file; what follows them is cut off."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(str(error), "give a file") from error
        whole = content[: content.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict):
                raise self._unusable(
                    f"line {number} is no JSON object", "give another file, or remove this one"
                )
            lines.append(line)
        if lines and lines[0].get("format") != FORMAT:
            raise self._unusable("a file that is no journal", "give another file")
        if not lines and not _line(self._header).startswith(content):
            raise self._unusable("a file that is no journal", "give another file")
        # Only now that it is known to be a journal.
        if len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return lines

    def _compare(self, found: Mapping[str, Any]) -> None:
        names = [*self._header, *(name for name in found if name not in self._header)]
        other = [name for name in names if found.get(name) != self._header.get(name)]
        if other:
            parts = [
                f"{name} {_short(found.get(name))} instead of {_short(self._header.get(name))}"
                for name in other
            ]
            raise self._unusable(
                f"the journal of other work: {'; '.join(parts)}",
                "give another file, or remove this one to start again",
            )

    def _unusable(self, found: str, advice: str) -> TrimtabError:
        return TrimtabError(f"to continue the journal {self.path}", found, advice)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else f"{text[:20]}…"
