"""`trimtab bake`: a checkpoint that steers itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.app import Json, Model, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    progress_bar,
    quiet_libraries,
    read_lever,
    read_vector,
    write_result,
)
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.steering.vector import VectorSteering
    from trimtab.steering.weights import WeightSteering


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
    strength: Annotated[
        float | None, typer.Option(help="Strength m to bake; as stored by default.")
    ] = None,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Only say by which route, at what cost, or why not.")
    ] = False,
    route: Annotated[str | None, typer.Option(help="Only by bias, null_block or convert.")] = None,
    every_writer: Annotated[
        int | None,
        typer.Option(
            metavar="LAYER", help="Ablate this layer's direction wherever the stream is written."
        ),
    ] = None,
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
    from trimtab.weights import at_every_writer, bake, bake_prompt, plan

    if out is None and not show_plan:
        raise TrimtabError("to bake", "no folder to write to", "give one with -o, or ask --plan")
    check_writable(None if out is None else out / "config.json", json_file)
    quiet_libraries()
    if len(files) == 1 and out is not None and _is_soft_prompt(Path(files[0])):
        done = bake_prompt(model, files[0], out, verify=verify, link=not copy)
        show(done, full=full)
        return write_result(json_file, done.to_dict())
    vectors = [_lever(file, strength) for file in files]
    if every_writer is not None:
        named = [(read_vector(file), v.strength) for file, v in zip(files, vectors, strict=True)]
        vectors = [part for v, m in named for part in at_every_writer(v.at(m), every_writer)]
    if show_plan or out is None:
        found = plan(model, vectors, route)
        show(found, full=full)
        return write_result(json_file, found.to_dict())
    with progress_bar(f"writing {out}") as progress:
        report = bake(
            model,
            vectors,
            out,
            verify=verify,
            route=route,
            link=not copy,
            progress=progress,
        )
    show(report, full=full)
    return write_result(json_file, report.to_dict())


def _lever(file: str, strength: float | None) -> VectorSteering | WeightSteering:
    from trimtab.steering.prompt import PromptSteering

    lever = read_lever(file)
    if isinstance(lever, PromptSteering):
        raise TrimtabError(
            asked=f"to bake {file}",
            found="a prompt in words, which has no place in the weights",
            advice="bake a vector, a low-rank update or a soft prompt; words go into the prompt",
        )
    return lever if strength is None else lever.at(strength)


def _is_soft_prompt(path: Path) -> bool:
    """Whether a file holds one table of numbers, as a soft prompt does and no vector."""
    from trimtab.weights.disk.checkpoint import read_header

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    facts = list(read_header(path).values())
    return len(facts) == 1 and len(facts[0].shape) == 2
