"""`trimtab close-gap`: a few tokens that carry the gap between the readout words across zero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.arguments import MAX_PROMPTS, NULLS
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Nulls, Seed, Toward, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import check_writable, load_model, progress_bar, write_result


@app.command("close-gap", epilog="Example: trimtab close-gap harbor refusal -o p.safetensors")
def close_gap_command(
    model: Model,
    behavior: BehaviorName,
    method: Annotated[str, typer.Option(help="How to search: sort or gradient.")] = "sort",
    direction: Toward = "toward",
    slot: Annotated[str, typer.Option(help="Where the tokens stand: prefix or suffix.")] = "suffix",
    prompt: Annotated[str | None, typer.Option(help="Close it for this prompt alone.")] = None,
    aggregator: Annotated[
        str, typer.Option(help="Of a set's logits: logsumexp or max.")
    ] = "logsumexp",
    train_prompts: Annotated[
        int, typer.Option(min=1, help="Most train prompts that the search sees.")
    ] = 16,
    nulls: Nulls = NULLS,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens.")] = 12,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the found prompt to this file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page into this folder.")] = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Find tokens that carry the gap between the readout words across zero.

    They are found on train prompts and scored on test prompts, beside random tokens.
    """
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.checks import choice
    from trimtab.prompts.gap.gap_search import METHODS, close_gap
    from trimtab.report.gap_section import gap_section
    from trimtab.report.page import write_page

    check_writable(out, json_file, None if report is None else report / "index.html")
    contrast = load_behavior(behavior)
    choice("gap search", method, tuple(METHODS))
    lm = load_model(model, dtype=torch.float32)
    with progress_bar(f"closing the gap of {contrast.name}") as progress:
        closed = close_gap(
            lm,
            contrast,
            method=method,
            direction=direction,
            slot=slot,
            prompt=prompt,
            aggregator=aggregator,
            train_prompts=train_prompts,
            nulls=nulls,
            max_prompts=max_prompts,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    show(closed, closed.found, full=full)
    if out is not None:
        closed.lever.save(out)
    if report is not None:
        write_page(report, [gap_section(closed)], title="Gap search", lead=lm.name)
    write_result(json_file, closed.to_dict())
