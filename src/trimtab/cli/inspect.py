"""`trimtab inspect`: what a steering file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import Json, app
from trimtab.cli.support import check_writable, in_short, read_lever, show, write_result
from trimtab.steering import VectorSteering
from trimtab.steering_file import describe
from trimtab.strength import convert
from trimtab.tables import Table


@app.command("inspect", epilog="Example: trimtab inspect refusal.safetensors")
def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file.")],
    json_file: Json = None,
) -> None:
    """Say what a steering file holds: its origin, its layers and its strength in every unit."""
    check_writable(json_file)

    facts = describe(file)
    shown = [
        (name.replace("_", " "), in_short(value))
        for name, value in facts.items()
        if name not in ("alphas", "norms", "class_gaps", "spreads")
    ]
    show(Table(str(file), ("what", "value"), tuple(shown)))
    lever = read_lever(str(file))
    if isinstance(lever, VectorSteering):
        show(convert(lever))
    write_result(json_file, facts)
