"""`trimtab demo`: the whole tour on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.cli.app import Json, app
from trimtab.cli.support import (
    check_writable,
    progress_bar,
    quiet_libraries,
    stdout_console,
    write_result,
)


@app.command("demo", epilog="Example: trimtab demo --out report")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    every: Annotated[bool, typer.Option("--all", help="All seven built-in behaviors.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the figures as one SVG file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Steer the built-in model, measure it, bake it, and write a report that opens offline."""
    from trimtab.demo import ALL_BEHAVIORS, BEHAVIORS, run_demo
    from trimtab.report import write_svg
    from trimtab.report.terminal import behavior_panel

    check_writable(out / "index.html", picture, json_file)
    quiet_libraries()
    console = stdout_console()
    with progress_bar("steering") as progress:
        data = run_demo(
            out,
            ALL_BEHAVIORS if every else BEHAVIORS,
            progress,
            tell=lambda name, entry: console.print(behavior_panel(name, entry)),
        )
    if picture is not None:
        write_svg(picture, data)
    console.print(Text(f"{out / 'index.html'}, {out / 'demo.json'}: {data['seconds']:.0f} s"))
    write_result(json_file, data)
