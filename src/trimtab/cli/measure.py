"""`trimtab measure`: levers side by side, with nulls and intervals."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.behavior import load_behavior
from trimtab.cli.app import BehaviorName, Json, Model, Seed, Tokens, app
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_lever,
    show,
    write_result,
)
from trimtab.measure import measure
from trimtab.steering import VectorSteering


@app.command(
    "measure",
    epilog='Example: trimtab measure harbor refusal refusal.safetensors prompt:"Refuse politely."',
)
def measure_command(
    model: Model,
    behavior: BehaviorName,
    levers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LEVER...", help="Steering files, or prompt:TEXT, prefix:TEXT, suffix:TEXT."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m of every vector; as stored by default.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A second model, measured like a lever: a baked folder.")
    ] = None,
    nulls: Annotated[int, typer.Option(min=0, help="Random directions per vector.")] = 3,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts a side.")
    ] = None,
    max_new_tokens: Tokens = 40,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Measure levers side by side on held-out prompts, with nulls and intervals."""
    check_writable(json_file)

    contrast = load_behavior(behavior)
    chosen = [read_lever(lever) for lever in levers or []]
    if strength is not None:
        chosen = [c.at(strength) if isinstance(c, VectorSteering) else c for c in chosen]
    lm = load_model(model)
    other = None if checkpoint is None else load_model(checkpoint)
    with progress_bar(f"measuring {contrast.name}") as progress:
        result = measure(
            lm,
            contrast,
            chosen,
            nulls=nulls,
            max_new_tokens=max_new_tokens,
            max_prompts=max_prompts,
            seed=seed,
            checkpoint=other,
            progress=progress,
        )
    show(result)
    write_result(json_file, result.to_dict())
