"""`trimtab serve`: stock vLLM with a folder of steering files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from trimtab.cli.app import Model, app
from trimtab.cli.support import load_model

if TYPE_CHECKING:
    from trimtab.serve.registry import VectorRegistry


@app.command(
    "serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: trimtab serve harbor --steer vectors/ --port 8000",
)
def serve_command(
    context: typer.Context,
    model: Model,
    folder: Annotated[
        Path,
        typer.Option("--steer", metavar="DIR", help="Folder of steering files (*.safetensors)."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the files, show the command, start nothing.")
    ] = False,
) -> None:
    """Start `vllm serve MODEL` with these vectors; all further arguments are vLLM's own.

    A request chooses vectors by name: `"vllm_xargs": {"steer": "mood:1.5"}`.
    """
    from trimtab.serve.launch import prepare, start

    launch = prepare(load_model(model), model, folder, context.args)
    _show(launch.registry)
    if dry_run:
        typer.echo(" ".join(launch.command))
        return
    start(launch)


def _show(registry: VectorRegistry) -> None:
    from trimtab.serve.registry import said

    console = Console(stderr=True, soft_wrap=True)
    for entry in registry.entries.values():
        console.print(Text(f"{entry.name}: m={entry.strength:g}, scope {entry.scope}"))
    for name, error in registry.refused.items():
        console.print(Text.assemble(("not registered: ", "bold red"), f"{name}: {said(error)}"))
