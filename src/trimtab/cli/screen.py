"""What a command prints: conclusions first, on one screen; everything with --full.

A screen is 40 lines of 100 columns. Rows of a long table are taken evenly from top to bottom, a wide
table of few rows is turned on its side, other wide tables lose their last columns, and every cut
says so. Pages and JSON hold everything.
"""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from trimtab.results.tables import Printable, Table

LINES, COLUMNS = 40, 100
FULL_COLUMNS = 160  # a pipe has no width, so whole tables get room there
# Most rows of the first table and of the others, most characters of a cell, most lines of notes.
FIRST_ROWS, ROWS, CELL, NOTES = 16, 10, 44, 3
PADDING = 2
GAP = PADDING + 1  # between columns

Full = Annotated[bool, typer.Option("--full", help="Print every table whole.")]


def show(
    *results: Printable | Table, full: bool = False, title: str | None = None, used: int = 0
) -> None:
    """Print results, the conclusion first.

    Args:
        results: what to print; tables, or values that have one.
        full: whether to print all of everything.
        title: a line above.
        used: lines of the screen that are taken already.
    """
    from trimtab.results.tables import Table

    tables = [each if isinstance(each, Table) else each.table() for each in results]
    if title is not None:
        _plain(full).print(Text(_clean(title)), soft_wrap=True)
    if full:
        for table in tables:
            _plain(full).print(table)
        return
    left, skipped = LINES - used - (title is not None), []
    for number, table in enumerate(tables):
        more = number + 1 < len(tables) or bool(skipped)
        text = _fitted(table, left - 2 * more, FIRST_ROWS if number == 0 else ROWS)
        if text is None:
            skipped.append(_clean(table.title))
            continue
        left -= text.count("\n")
        _plain(full).print(Text(text.rstrip("\n")), soft_wrap=True)
    if skipped:
        names = "; ".join(skipped)
        room = 2 * COLUMNS - len("More with --full: ") - 1
        said = names if len(names) <= room else names[: room - 1] + "…"
        _plain(full).print(Text(f"More with --full: {said}"))


def _clean(text: str) -> str:
    from trimtab.results.tables import clean

    return clean(text)


def _plain(full: bool) -> Console:
    width = FULL_COLUMNS if full else COLUMNS
    if sys.stdout.isatty():
        console = Console()
        return console if full else Console(width=min(console.width, width))
    return Console(width=width, color_system=None)


def _fitted(table: Table, lines: int, rows: int) -> str | None:
    """The table on so many lines, with fewer rows if need be; None where three rows do not fit."""
    while rows >= 3:
        text = _drawn(_narrowed(table), rows)
        if text.count("\n") <= lines:
            return text
        rows -= 1
    return None


def _narrowed(table: Table) -> Table:
    """A table that fits the width: as it is, on its side, or without its last columns."""
    if _width(table) <= COLUMNS or not table.rows:
        return table
    if 1 < len(table.rows) <= 4 or (len(table.rows) == 1 and len(table.columns) > 2):
        sides = tuple(zip(*table.rows, strict=True))
        names = zip(table.columns[1:], sides[1:], strict=True)
        rows = tuple((name, *cells) for name, cells in names)
        turned = replace(table, columns=(table.columns[0], *sides[0]), rows=rows)
        if _width(turned) <= COLUMNS:
            return turned
    count = len(table.columns)
    while count > 2 and _width(_first(table, count)) > COLUMNS:
        count -= 1
    return _first(table, count)


def _first(table: Table, count: int) -> Table:
    lost = table.columns[count:]
    if not lost:
        return table
    note = f"columns left out (--full): {', '.join(lost)}"
    rows = tuple(row[:count] for row in table.rows)
    return replace(table, columns=table.columns[:count], rows=rows, notes=(note, *table.notes))


def _width(table: Table) -> int:
    widths = [
        max(len(_cell(cell, _most(table))) for cell in column)
        for column in zip(table.columns, *table.rows, strict=True)
    ]
    return sum(widths) + GAP * (len(widths) - 1)


def _cell(text: str, most: int) -> str:
    text = " ".join(_clean(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _most(table: Table) -> int:
    """Most characters of a cell; of two columns, one holds names and the other what there is."""
    if len(table.columns) != 2:
        return CELL
    names = max((len(row[0]) for row in table.rows), default=0)
    return max(COLUMNS - names - GAP, CELL)


def _drawn(table: Table, rows: int) -> str:
    shown = list(table.rows)
    if len(shown) > rows:
        kept = sorted({round(i * (len(shown) - 1) / (rows - 1)) for i in range(rows)})
        shown = [shown[i] for i in kept]
    grid = RichTable(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, PADDING, 0, 0), collapse_padding=True
    )  # fmt: skip
    most = _most(table)
    for index, column in enumerate(table.columns):
        numeric = all(row[index][:1] in "+-–0123456789" for row in table.rows)
        grid.add_column(
            Text(_cell(column, most)), justify="right" if numeric else "left", no_wrap=True
        )
    for row in shown:
        grid.add_row(*(Text(_cell(cell, most)) for cell in row))
    console = Console(file=io.StringIO(), width=COLUMNS, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(Text(_clean(table.title), style="bold"))
        console.print(grid)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
    if len(shown) < len(table.rows):
        text += f"({len(shown)} of {len(table.rows)} rows; all with --full)\n"
    return text + _notes(table)


def _notes(table: Table) -> str:
    if not table.notes:
        return ""
    lines = list(Text(" ".join(map(_clean, table.notes))).wrap(Console(width=COLUMNS), COLUMNS))
    shown = [line.plain.rstrip() for line in lines[:NOTES]]
    if len(lines) > NOTES:
        shown[-1] = shown[-1][: COLUMNS - 2] + " …"
    return "\n".join(shown) + "\n"
