"""`trimtab bake`: a checkpoint that steers itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.app import EveryWriter, Json, Model, Strength, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    progress_bar,
    quiet_libraries,
    read_lever,
    write_result,
)
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.steering.prompt import PromptSteering
    from trimtab.steering.weights import Scaled
    from trimtab.weights import SoftPrompt


@app.command("bake", epilog="Example: trimtab bake harbor refusal.safetensors -o refusing-harbor")
def bake_command(
    model: Model,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Steering files of vectors and low-rank updates, or a soft prompt's.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to create.")] = None,
    strength: Strength = None,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Only say by which route, at what cost, or why not.")
    ] = False,
    route: Annotated[str | None, typer.Option(help="Only by bias, null_block or convert.")] = None,
    every_writer: EveryWriter = None,
    verify: Annotated[
        bool, typer.Option(help="Reload the checkpoint and compare it with the hook.")
    ] = True,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy unchanged files instead of hard links.")
    ] = False,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Write a checkpoint that steers itself, or refuse and say why."""
    from trimtab.weights import bake, plan

    if out is None and not show_plan:
        raise TrimtabError("to bake", "no folder to write to", "give one with -o, or ask --plan")
    check_writable(None if out is None else out / "config.json", json_file)
    quiet_libraries()
    levers = [_lever(file, strength) for file in files]
    lever: Any = levers[0] if len(levers) == 1 else levers
    if show_plan or out is None:
        found = plan(model, lever, route, every_writer)
    else:
        with progress_bar(f"writing {out}") as progress:
            found = bake(
                model,
                lever,
                out,
                verify=verify,
                route=route,
                every_writer=every_writer,
                copy=copy,
                progress=progress,
            )
    show(found, full=full)
    write_result(json_file, found.to_dict())


def _lever(file: str, strength: float | None) -> Scaled | PromptSteering | SoftPrompt:
    """Read a steering file, or a file with one table of numbers, which is a soft prompt too."""
    from trimtab.weights.disk.checkpoint import read_header
    from trimtab.weights.soft.prompt import read_soft

    path = Path(file)
    if path.suffix == ".safetensors" and path.is_file():
        facts = list(read_header(path).values())
        if len(facts) == 1 and len(facts[0].shape) == 2:
            return read_soft(path)
    lever = read_lever(file)
    return lever if strength is None else lever.at(strength)
