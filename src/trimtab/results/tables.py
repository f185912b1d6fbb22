"""Results on screen, in notebooks and on disk: one plain table, three renderings, one JSON writer.

A result is a frozen dataclass that inherits `Printable` and says what its `table()` is; printing
with rich, showing in a notebook, `str()`, `to_dict()` and `save()` follow from that. Model and
user text is never interpreted: control characters are dropped, rich markup and HTML are escaped.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from trimtab.errors import TrimtabError
from trimtab.results.files import written

ABSENT = "–"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Printable(ABC):
    """Mixin for results: give it `table()`, get the renderings, a dict and a JSON file."""

    @abstractmethod
    def table(self) -> Table:
        """Return the table that stands for this result."""

    def __rich__(self) -> RichTable:
        return self.table().__rich__()

    def __str__(self) -> str:
        return self.table().to_text()

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain JSON-able values; NaN and infinities become None."""
        plain = to_plain(self)
        assert isinstance(plain, dict)
        return plain

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result as JSON, atomically, and return the path."""
        return write_json(path, self.to_dict())


@dataclasses.dataclass(frozen=True)
class Table(Printable):
    """A titled grid of strings with notes underneath, e.g. why a column is empty."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ragged = [row for row in self.rows if len(row) != len(self.columns)]
        assert not ragged, f"rich would silently pad {ragged[0]} to {self.columns}"

    def __rich__(self) -> RichTable:
        """Build the rich table; numbers align right, text is shown literally."""
        table = RichTable(
            title=Text(clean(self.title)),
            caption=Text(clean("\n".join(self.notes))) if self.notes else None,
            caption_justify="left",
            title_justify="left",
        )
        for index, column in enumerate(self.columns):
            numeric = all(_looks_numeric(row[index]) for row in self.rows)
            table.add_column(Text(clean(column)), justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        return table

    def table(self) -> Table:
        return self

    def to_text(self, width: int = 120) -> str:
        """Render as plain characters, `width` columns wide."""
        console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get()

    def to_html(self) -> str:
        """Render as one HTML table in which every piece of text is escaped."""
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"
        )


def to_plain(value: object) -> object:
    """Turn dataclasses, tensors, arrays, paths and numbers into plain JSON-able values.

    Raises:
        TrimtabError: for a type that has no obvious JSON form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(float(value)) else None
    if isinstance(value, torch.Tensor | np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((to_plain(item) for item in value), key=repr)
    if isinstance(value, Sequence):
        return [to_plain(item) for item in value]
    raise TrimtabError(
        asked="a result as plain values",
        found=f"a {type(value).__name__}",
        advice="keep numbers, text, tensors and dataclasses in results",
    )


def write_json(path: str | os.PathLike[str], data: object) -> Path:
    """Write strict JSON; no reader sees half a file.

    Raises:
        TrimtabError: when the folder cannot be written.
    """
    text = json.dumps(to_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with written(path) as file:
        file.write_text(text, encoding="utf-8")
    return Path(path)


def clean(text: str) -> str:
    """Drop control and bidirectional-override characters, which can rewrite a terminal's screen."""
    return _CONTROL.sub("", text)


def escape(text: str) -> str:
    """Escape text for HTML, quotes included, control characters dropped."""
    return html.escape(clean(text), quote=True)


def number(value: float | None, digits: int = 2) -> str:
    """Format a figure with `digits` decimals; small non-zero ones keep two significant digits."""
    if value is None or math.isnan(value):
        return ABSENT
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def with_interval(
    value: float | None, low: float | None, high: float | None, digits: int = 2
) -> str:
    """Format a figure with its interval, `0.92 [0.80, 0.98]`."""
    if value is None or math.isnan(value):
        return ABSENT
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def percent(value: float | None) -> str:
    """Format a share as a whole percentage."""
    return ABSENT if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def _looks_numeric(cell: str) -> bool:
    return cell == ABSENT or bool(re.match(r"^[+-]?\d", cell))
