"""A behavior's figures for the terminal: the answer, the levers, and answers before and after."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from trimtab.report.figures import LABELS, Row, levers_of
from trimtab.report.words import answer, warnings
from trimtab.results.tables import Table, clean, number, percent

SHOWN = 2  # answers before and after


def behavior_panel(name: str, entry: Row) -> Group:
    """Return what a terminal shows of one behavior; model text is never read as markup."""
    parts: list[RenderableType] = [
        Rule(Text(name), align="left"),
        Text(answer(name, entry)),
        *(Text(warning, style="yellow") for warning in warnings(name, entry)),
    ]
    levers = levers_of(entry)
    if levers:
        parts.append(_levers(levers))
    if entry.get("samples"):
        parts.append(_samples(entry))
    return Group(*parts, Text(""))


def _levers(levers: list[tuple[str, Row]]) -> Table:
    rows = tuple(
        (
            LABELS[lever],
            f"{percent(row['score'])} [{percent(row.get('low'))}, {percent(row.get('high'))}]",
            str(row.get("n", "")),
            percent(row.get("coherence")),
            number(row.get("damage")),
            number(row.get("spill")),
        )
        for lever, row in levers
    )
    columns = ("lever", "behavior [95 %]", "n", "coherence", "damage", "spill")
    return Table("", columns, rows)


def _samples(entry: Row) -> RichTable:
    table = RichTable(show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1)
    for sample in entry["samples"][:SHOWN]:
        prompt = sample["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        table.add_row(*(Text(clean(text)) for text in (prompt, sample["before"], sample["after"])))
    return table
