"""`trimtab bake`: a checkpoint that steers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import Json, Model, app
from trimtab.cli.support import check_writable, load_model, read_lever, show, write_result
from trimtab.errors import TrimtabError
from trimtab.steering import VectorSteering
from trimtab.weights import bake


@app.command("bake", epilog="Example: trimtab bake harbor refusal.safetensors -o refusing-harbor")
def bake_command(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file with a vector.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to create.")],
    strength: Annotated[
        float | None, typer.Option(help="Strength m to bake; as stored by default.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Write a checkpoint that steers itself, or refuse and say why."""
    check_writable(out / "config.json", json_file)

    vector = read_lever(str(file))
    if not isinstance(vector, VectorSteering):
        raise TrimtabError(
            asked=f"to bake {file}",
            found="a prompt, which has no place in the weights",
            advice="bake a vector; a prompt goes into the system message",
        )
    report = bake(load_model(model), vector if strength is None else vector.at(strength), out)
    show(report)
    write_result(json_file, report.to_dict())
