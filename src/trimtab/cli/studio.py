"""`trimtab studio`: the browser app."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from trimtab.cli.app import Model, app
from trimtab.cli.support import load_model
from trimtab.errors import TrimtabError


@app.command("studio", epilog="Example: trimtab studio harbor --port 7860")
def studio_command(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 7860,
) -> None:
    """Open the browser app: a strength slider with answers and gauges that follow."""
    try:
        studio = importlib.import_module("trimtab.studio.app")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise TrimtabError(
            "to open the browser app",
            f"no package {error.name}",
            "install the extra: pip install 'trimtab[studio]'",
        ) from error
    console = Console(stderr=True, soft_wrap=True)
    studio.serve(
        load_model(model),
        host,
        port,
        lambda url: console.print(Text(f"Trimtab Studio: {url} (Ctrl-C ends it)")),
    )
