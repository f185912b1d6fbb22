"""`trimtab inspect`: what a steering file or a checkpoint folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import Json, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import check_writable, in_short, read_lever, write_result


@app.command("inspect", epilog="Example: trimtab inspect refusal.safetensors")
def inspect_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A steering file, or a checkpoint's folder.")
    ],
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Say what a file or checkpoint holds: its origin, its layers, its strength in every unit.

    Of a checkpoint: tensors that its architecture would drop on loading, and what Trimtab baked in.
    """
    from trimtab.results.tables import Table
    from trimtab.steering.load import describe
    from trimtab.steering.units import convert
    from trimtab.steering.vector import VectorSteering
    from trimtab.weights import inspect_checkpoint

    check_writable(json_file)
    if file.is_dir():
        found = inspect_checkpoint(file)
        show(found, full=full)
        return write_result(json_file, found.to_dict())
    facts = describe(file)
    shown = [
        (name.replace("_", " "), in_short(value))
        for name, value in facts.items()
        if name not in ("alphas", "norms", "class_gaps", "spreads")
    ]
    tables = [Table(str(file), ("what", "value"), tuple(shown))]
    lever = read_lever(str(file))
    if isinstance(lever, VectorSteering):
        tables.append(convert(lever).table())
    show(*tables, full=full)
    return write_result(json_file, facts)
