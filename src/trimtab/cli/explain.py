"""`trimtab explain`: why a steering works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Direction
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Nulls, Seed, Tokens, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_vector,
    stdout_console,
    write_result,
)


@app.command("explain", epilog="Example: trimtab explain harbor refusal v.safetensors --report why")
def explain_command(
    model: Model,
    behavior: BehaviorName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file with a vector.")],
    strength: Annotated[
        float | None,
        typer.Option(
            help="Strength m. By default that of the file or, where it moves nothing, the weakest "
            "that does."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Another vector, added at the same place: also run the circuit of each under the other.",
        ),
    ] = None,
    direction: Annotated[
        Direction | None,
        typer.Option(help="Where the strength goes by default; both: also the other way, as far."),
    ] = None,
    nulls: Nulls = NULLS,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    seed: Seed = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write a page into this folder.")
    ] = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Measure which edges, heads and MLPs carry a vector, what it says, how sparse and linear it is."""
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.mechanism.explained import explain
    from trimtab.report.explain_page import write_explain_page

    check_writable(json_file, None if report is None else report / "index.html")
    contrast, vector = load_behavior(behavior), read_vector(file)
    other = None if against is None else read_vector(against)
    # Half precision would round the scores of small edges away.
    lm = load_model(model, dtype=torch.float32)
    with progress_bar(f"explaining {contrast.name}") as progress:
        found = explain(
            lm,
            contrast,
            vector,
            against=other,
            strength=strength,
            direction=direction,
            nulls=nulls,
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    # Files first: a reader that closes the pipe early should not cost them.
    write_result(json_file, found.to_dict())
    page = None if report is None else write_explain_page(report, found)
    show(found, *found.tables()[:-1], full=full)
    if page is not None:
        stdout_console().print(Text(str(page)))
