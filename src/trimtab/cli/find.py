"""`trimtab find`: a steering vector from a contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.behavior import load_behavior
from trimtab.cli.app import BehaviorName, Json, Model, Seed, app
from trimtab.cli.sparse import Sparsify, check_share
from trimtab.cli.support import (
    check_writable,
    load_model,
    parse_layers,
    parse_position,
    progress_bar,
    show,
    write_result,
)
from trimtab.explain.sparsify import sparsify
from trimtab.find import METHODS, find
from trimtab.measure import judge_for
from trimtab.steering_file import describe
from trimtab.strength import convert


@app.command(
    "find", epilog="Example: trimtab find harbor refusal -o refusal.safetensors --method next_token"
)
def find_command(
    model: Model,
    behavior: BehaviorName,
    out: Annotated[Path, typer.Option("--out", "-o", help="The steering file to write.")],
    method: Annotated[str, typer.Option(help="How to find it.")] = "mean_difference",
    layers: Annotated[
        str | None, typer.Option(help="Layers to steer, counted from 0: `2`, `2,5` or `2-5`.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Tokens to steer: all, last, prompt, post_instruction, generated, [a,b)."
        ),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(
            help="Where prompts are read: last, post_instruction, answer, k (the most telling of "
            "the last k positions) or -k (exactly that one)."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m to store; the method's own by default.")
    ] = None,
    keep: Sparsify = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Find a steering vector for a behaviour and write it as one file."""
    check_writable(out, json_file)
    check_share(keep)
    chosen = None if layers is None else parse_layers(layers)

    contrast = load_behavior(behavior)
    lm = load_model(model)
    options: dict[str, Any] = {} if position is None else {"position": parse_position(position)}
    if method in METHODS and "judge" in METHODS[method].options and contrast.judge is not None:
        options["judge"] = judge_for(contrast)  # wanted answers must show the behaviour
    with progress_bar(f"finding {contrast.name}") as progress:
        vector = find(
            lm,
            contrast,
            method,
            layers=chosen,
            scope=scope,
            seed=seed,
            progress=progress,
            **options,
        )
    if strength is not None:
        vector = vector.at(strength)
    if keep is not None:
        with progress_bar("weighing dimensions") as progress:
            vector = sparsify(lm, contrast, vector, keep, seed=seed, progress=progress)
    vector.save(out)
    show(convert(vector), f"{vector.label}, written to {out}")
    write_result(json_file, {"file": str(out), **describe(out)})
