"""`trimtab levers`: every lever for a behavior on one axis, under one budget of damage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Nulls, Seed, Tokens, Toward, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_lever,
    read_vector,
    write_result,
)
from trimtab.errors import TrimtabError


@app.command("levers", epilog="Example: trimtab levers harbor refusal --budget 0.5 --report levers")
def levers_command(
    model: Model,
    behavior: BehaviorName,
    budget: Annotated[
        float, typer.Option(help="Damage (on-target KL) allowed: nats per token, 95th percentile.")
    ] = 0.5,
    direction: Toward = "toward",
    vector: Annotated[
        Path | None, typer.Option(help="A steering file; its directions, instead of found ones.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="prompt:TEXT, prefix:TEXT, suffix:TEXT, instead of a searched one."),
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
    """Compare prompt, soft prompt, vector, bias, rank-1, LoRA and ablation at equal damage.

    Found on train prompts, placed on validation prompts, scored on test prompts; ends in one sentence
    that says which to choose.
    """
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.levers import compare_levers
    from trimtab.report.levers_section import levers_section
    from trimtab.report.page import write_page
    from trimtab.steering.prompt import PromptSteering

    page = None if report is None else report / "index.html"
    check_writable(json_file, page)
    contrast = load_behavior(behavior)
    given = None if vector is None else read_vector(vector)
    words = None if prompt is None else read_lever(prompt)
    if words is not None and not isinstance(words, PromptSteering):
        raise TrimtabError(
            asked=f"the prompt {prompt!r}",
            found="a vector",
            advice="give prompt:TEXT, prefix:TEXT or suffix:TEXT, and the vector with --vector",
        )
    # Damage is placed to a few thousandths of a nat, which half precision would drown.
    lm = load_model(model, dtype=torch.float32)
    with progress_bar(f"comparing levers for {contrast.name}") as progress:
        found = compare_levers(
            lm,
            contrast,
            budget=budget,
            direction=direction,
            vector=given,
            prompt=words,
            nulls=nulls,
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    show(found, full=full)
    if report is not None:
        write_page(report, [levers_section(found)], title="Which lever", lead=found.model)
    write_result(json_file, found.to_dict())
