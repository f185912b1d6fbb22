"""Text of files that users write, and the place in them that an error names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.behaviors.parts import BehaviorError, Location, describe
from trimtab.errors import TrimtabError


@dataclass(frozen=True)
class Located:
    """Plain values from a file, and a function from a place in them to its line, counted from 1."""

    content: Any
    line: Callable[[Location], int]


def refuse_at(path: Path, line: int, found: str, advice: str) -> TrimtabError:
    """Return the error for a place in a file."""
    return TrimtabError(f"the file {path}", f"{path.name}:{line}: {found}", advice)


def refuse_in(located: Located, path: Path, error: BehaviorError) -> TrimtabError:
    """Return the error for what is wrong with a file's content, with its line."""
    where = f"{describe(error.location)}: " if error.location else ""
    return refuse_at(path, located.line(error.location), f"{where}{error.found}", error.advice)


def read_text(path: Path, docs: str = "docs/behaviors.md") -> str:
    """Return the text of a UTF-8 file that is not empty; `docs` describes such a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrimtabError(
            f"the file {path}", error.strerror or str(error), "check its permissions"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"the byte 0x{data[error.start]:02x}, which is not UTF-8"
        raise refuse_at(path, line, found, "save the file as UTF-8") from error
    if not text.strip():
        raise refuse_at(path, 1, "an empty file", f"see {docs} for a file to copy")
    return text
