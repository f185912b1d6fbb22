"""`trimtab audit`: how wide a behavior's margin is; nothing is searched or steered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.arguments import MAX_PROMPTS
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Report, Seed, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    stdout_console,
    write_result,
)


@app.command("audit", epilog="Example: trimtab audit harbor refusal --against ./hardened")
def audit_command(
    model: Model,
    behavior: BehaviorName,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL2", help="A second checkpoint; differences are MODEL - MODEL2."),
    ] = None,
    aggregator: Annotated[
        str, typer.Option(help="Of a set's logits: logsumexp, max, log_odds.")
    ] = "logsumexp",
    learn: Annotated[
        bool,
        typer.Option("--learn-sets", help="Read first tokens of train answers, not the words."),
    ] = False,
    layer: Annotated[
        int | None, typer.Option(min=0, help="The layer that is pushed to close the gap.")
    ] = None,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    seed: Seed = 0,
    report: Report = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Measure the logit gap, its margin and what closing it costs, on held-out prompts.

    Of a baked MODEL against its base, random directions as long as the baked ones give the null.
    """
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.checks import choice
    from trimtab.evaluation.readout import AGGREGATORS
    from trimtab.margins import audit, learn_sets
    from trimtab.margins.baked import recorded
    from trimtab.models.baked import read_record
    from trimtab.report.audit_page import write_audit_page

    check_writable(json_file, None if report is None else report / "index.html")
    choice("aggregator", aggregator, AGGREGATORS)
    contrast = load_behavior(behavior)
    # Half precision would round gaps to a few hundredths.
    lm = load_model(model, dtype=torch.float32)
    other = None if against is None else load_model(against, dtype=torch.float32)
    record = None if other is None else read_record(Path(model))
    baked = [] if other is None or record is None else recorded(record, other)
    sets = learn_sets(lm, contrast, seed=seed) if learn else None
    with progress_bar(f"auditing {contrast.name}") as progress:
        found = audit(
            lm,
            contrast,
            against=other,
            baked=baked,
            aggregator=aggregator,
            sets=sets,
            layer=layer,
            max_prompts=max_prompts,
            seed=seed,
            progress=progress,
        )
    # Files first: a reader that closes the pipe early should not cost them.
    write_result(json_file, found.to_dict())
    page = None if report is None else write_audit_page(report, found)
    show(found, *([sets] if sets is not None else []), *found.tables(), full=full)
    if page is not None:
        stdout_console().print(Text(str(page)))
