"""`trimtab measure`: levers side by side, with nulls and intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Direction
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Nulls, Seed, Tokens, app
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_lever,
    write_result,
)
from trimtab.errors import TrimtabError, extra


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
        float | None,
        typer.Option(help="Strength m of every vector or low-rank update; as stored by default."),
    ] = None,
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
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Also run tasks of the harness lm-eval."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --tasks: a folder with your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: at most so many documents of each.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: worked examples before a document.")
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="With --tasks: documents as a user's turn."),
    ] = False,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Measure levers side by side on held-out prompts, with nulls and intervals."""
    from trimtab.behaviors.file import load_behavior
    from trimtab.engine import open_engine
    from trimtab.evaluation import measure
    from trimtab.evaluation.tasks.tasks import measure_tasks
    from trimtab.steering.prompt import PromptSteering

    check_writable(json_file)
    check_engine(engine)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names:
        extra("lm_eval.models.huggingface", "lm-eval")
    elif tasks is not None or include_path or limit or fewshot is not None or chat_template:
        raise TrimtabError(
            asked="to run tasks of lm-eval",
            found="no task, but options of --tasks",
            advice="name one: --tasks arc_easy",
        )

    contrast = load_behavior(behavior)
    chosen = [read_lever(lever) for lever in levers or []]
    if strength is not None:
        chosen = [c if isinstance(c, PromptSteering) else c.at(strength) for c in chosen]
    lm = load_model(model)
    other = None if checkpoint is None else load_model(checkpoint)
    scored = None
    if names:
        # First, for a task that cannot be run is to be found before the long work.
        with progress_bar(f"running {', '.join(names)}") as progress:
            scored = measure_tasks(
                lm,
                chosen,
                names,
                include_path=include_path,
                limit=limit,
                fewshot=fewshot,
                seed=seed,
                nulls=nulls,
                apply_chat_template=chat_template,
                progress=progress,
            )
    with (
        open_engine(engine, lm, address=address, workers=workers) as where,
        progress_bar(f"measuring {contrast.name}") as progress,
    ):
        result = measure(
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
    show(result, *([] if scored is None else [scored]), full=full)
    data = result.to_dict()
    if scored is not None:
        data["tasks"] = scored.to_dict()
    write_result(json_file, data)
