"""`trimtab demo`: the whole tour on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.rule import Rule
from rich.text import Text

from trimtab.cli.app import Json, app
from trimtab.cli.support import (
    check_writable,
    progress_bar,
    quiet_libraries,
    stdout_console,
    write_result,
)

SHOWN = 2  # tables: the levers, and answers before and after


@app.command("demo", epilog="Example: trimtab demo --out report")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    every: Annotated[bool, typer.Option("--all", help="All seven built-in behaviors.")] = False,
    json_file: Json = None,
) -> None:
    """Steer the built-in model, measure it, bake it, and write a report that opens offline."""
    from trimtab.demo import ALL_BEHAVIORS, BEHAVIORS, run_demo
    from trimtab.report.page import Section
    from trimtab.results.tables import clean

    check_writable(out / "index.html", json_file)
    quiet_libraries()
    console = stdout_console()

    def tell(section: Section) -> None:
        console.print(Rule(Text(clean(section.title)), align="left"))
        console.print(Text(clean("\n".join(section.paragraphs))))
        console.print(Text(clean("\n".join(section.warnings)), style="yellow"))
        console.print(*section.tables[:SHOWN], sep="\n")

    with progress_bar("steering") as progress:
        data = run_demo(out, ALL_BEHAVIORS if every else BEHAVIORS, progress, tell=tell)
    console.print(Text(f"{out / 'index.html'}, {out / 'demo.json'}: {data['seconds']:.0f} s"))
    write_result(json_file, data)
