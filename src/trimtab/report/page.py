"""A page of sections that opens offline: paragraphs, warnings, figures and tables in one order.

Text from models and users is escaped by jinja2's autoescape; figures travel as JSON in which `<` is
escaped, and are drawn by the Plotly bundle beside the page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trimtab.report.figures import Figure
from trimtab.results.files import written
from trimtab.results.tables import ABSENT, Table, clean, to_plain

TEMPLATES = Environment(
    loader=PackageLoader("trimtab.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Section:
    """One part of a page: plain text, figures, tables, and warnings that are set apart."""

    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()


def write_page(
    folder: str | os.PathLike[str],
    sections: Sequence[Section],
    *,
    title: str = "How hard to pull",
    lead: str = "",
) -> Path:
    """Write `index.html` and `plotly.min.js` into a folder and return the page's path.

    The folder is made when missing; other files in it are left alone.
    """
    from plotly.offline import get_plotlyjs  # four megabytes, read only when a page is written

    page, target = render(sections, title=title, lead=lead), Path(folder)
    for name, text in (("plotly.min.js", get_plotlyjs()), ("index.html", page)):
        with written(target / name) as file:
            file.write_text(text, encoding="utf-8")
    return target / "index.html"


def render(sections: Sequence[Section], *, title: str, lead: str = "") -> str:
    """Render the page's HTML without writing anything."""
    assert sections, f"the page {title!r} has no sections"
    views = [_view(section, number) for number, section in enumerate(sections, start=1)]
    page = TEMPLATES.get_template("page.html.j2")
    return page.render(title=clean(title), lead=clean(lead), sections=views)


def _view(section: Section, number: int) -> dict[str, Any]:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", section.title).strip("-").lower()
    return {
        "id": f"section-{number}" + (f"-{slug}" if slug else ""),
        "title": clean(section.title),
        "paragraphs": [clean(text) for text in section.paragraphs if text],
        "warnings": [clean(text) for text in section.warnings],
        "figures": [to_plain(figure) for figure in section.figures],
        "tables": [_table(table) for table in section.tables],
    }


def _table(table: Table) -> dict[str, Any]:
    cells = [[clean(cell) for cell in row] for row in table.rows]
    columns = [
        {"name": clean(name), "text": not all(_numeric(row[i]) for row in cells)}
        for i, name in enumerate(table.columns)
    ]
    notes = [clean(note) for note in table.notes]
    return {"title": clean(table.title), "columns": columns, "rows": cells, "notes": notes}


def _numeric(cell: str) -> bool:
    return cell in ("", ABSENT) or bool(re.match(r"[+-]?(\d|inf|nan)", cell))
