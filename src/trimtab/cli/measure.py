"""`trimtab measure`: levers side by side, with nulls and intervals."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Direction
from trimtab.cli.app import (
    BehaviorName,
    Json,
    Levers,
    MaxPrompts,
    Model,
    Nulls,
    Seed,
    Strength,
    Tokens,
    app,
)
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_levers,
    write_result,
)


@app.command(
    "measure",
    epilog='Example: trimtab measure harbor refusal refusal.safetensors prompt:"Refuse politely."',
)
def measure_command(
    model: Model,
    behavior: BehaviorName,
    levers: Levers = None,
    strength: Strength = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A second model, measured like a lever: a baked folder.")
    ] = None,
    direction: Annotated[
        Direction | None, typer.Option(help="Where each strength goes by default.")
    ] = None,
    nulls: Nulls = NULLS,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Measure levers side by side on held-out prompts, with nulls and intervals."""
    from trimtab.behaviors.file import load_behavior
    from trimtab.engine import open_engine
    from trimtab.evaluation import measure

    check_writable(json_file)
    check_engine(engine)
    contrast, chosen = load_behavior(behavior), read_levers(levers, strength)
    lm = load_model(model)
    other = None if checkpoint is None else load_model(checkpoint)
    with (
        open_engine(engine, lm, address=address, workers=workers) as where,
        progress_bar(f"measuring {contrast.name}") as progress,
    ):
        found = measure(
            lm,
            contrast,
            chosen,
            direction=direction,
            nulls=nulls,
            max_new_tokens=max_new_tokens,
            max_prompts=max_prompts,
            seed=seed,
            checkpoint=other,
            progress=progress,
            engine=where,
        )
    show(found, full=full)
    write_result(json_file, found.to_dict())
