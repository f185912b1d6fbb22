"""`trimtab tasks`: levers on tasks of the evaluation harness lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.arguments import NULLS
from trimtab.cli.app import Json, Levers, Model, Nulls, Seed, Strength, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_levers,
    write_result,
)
from trimtab.errors import extra


@app.command(
    "tasks", epilog="Example: trimtab tasks harbor arc_easy,piqa refusal.safetensors --limit 100"
)
def tasks_command(
    model: Model,
    tasks: Annotated[
        str, typer.Argument(metavar="TASK[,TASK]", help="Names that lm-eval or --include-path knows.")
    ],
    levers: Levers = None,
    strength: Strength = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own.")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="At most so many documents of each; below 1 a share of them."),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before a document.")
    ] = None,
    nulls: Nulls = NULLS,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a call of the model.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Documents as a user's turn.")
    ] = False,
    seed: Seed = 0,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Run tasks of lm-eval on the unsteered model, each lever and random directions."""
    from trimtab.evaluation.tasks.tasks import measure_tasks

    check_writable(json_file)
    extra("lm_eval.models.huggingface", "lm-eval")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = read_levers(levers, strength)
    lm = load_model(model)
    with progress_bar(f"running {', '.join(names)}") as progress:
        found = measure_tasks(
            lm,
            names,
            chosen,
            include_path=include_path,
            limit=limit,
            fewshot=fewshot,
            nulls=nulls,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            seed=seed,
            progress=progress,
        )
    show(found, full=full)
    write_result(json_file, found.to_dict())
