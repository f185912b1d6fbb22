"""`trimtab tune`: layers, scope and strength under a budget of damage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, signs_of
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Seed, Tokens, Toward, app
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import Full, show
from trimtab.cli.sparse import Sparsify, check_share
from trimtab.cli.support import (
    check_writable,
    load_model,
    parse_layers,
    progress_bar,
    read_vector,
    write_result,
)

if TYPE_CHECKING:
    from trimtab.steering.vector import VectorSteering
    from trimtab.strength.tune import Tuned

Layers: TypeAlias = "list[list[int]] | None"


@app.command("tune", epilog="Example: trimtab tune harbor refusal v.safetensors --budget 0.5")
def tune_command(
    model: Model,
    behavior: BehaviorName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file with a vector.")],
    budget: Annotated[
        float, typer.Option(help="Damage (on-target KL) allowed: nats per token, 95th percentile.")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the tuned vector to this file.")
    ] = None,
    direction: Toward = "toward",
    layers: Annotated[
        list[str] | None,
        typer.Option(help="A layer set to try, `2`, `2,5` or `2-5`; may be given again."),
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="A scope to try; may be given again.")
    ] = None,
    spill_budget: Annotated[
        float | None, typer.Option(help="Spill (off-target KL) allowed, nats per token, 95th percentile.")
    ] = None,
    coherence_floor: Annotated[float, typer.Option(help="Least mean coherence.")] = 0.9,
    target: Annotated[float, typer.Option(help="Score that the window has to reach.")] = 0.9,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Also measure a strength for each prompt.")
    ] = False,
    keep: Sparsify = None,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the curve as a page into this folder.")
    ] = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Choose layers, scope and strength on validation prompts; report them on test prompts.

    Refuses, with the curve, when no strength keeps the budget and moves the behavior. With
    --sparsify the chosen vector is made sparse and its strength is chosen again.
    """
    from trimtab.behaviors.file import load_behavior
    from trimtab.engine import open_engine
    from trimtab.mechanism.case import Case
    from trimtab.mechanism.sparse.sparsify import sparsify
    from trimtab.report.page import write_page
    from trimtab.report.strength_sections import tune_section
    from trimtab.steering.units import convert
    from trimtab.strength.sweep import NoStrengthPasses
    from trimtab.strength.tune import tune

    check_share(keep)
    check_engine(engine)
    page = None if report is None else report / "index.html"
    check_writable(out, json_file, page)
    sets = None if layers is None else [parse_layers(text) for text in layers]

    contrast, vector = load_behavior(behavior), read_vector(file)
    lm = load_model(model)

    def choose(lever: VectorSteering, sets: Layers, scopes: list[str] | None, title: str) -> Tuned:
        with (
            open_engine(engine, lm, address=address, workers=workers) as where,
            progress_bar(title) as progress,
        ):
            return tune(
                lm,
                contrast,
                lever,
                budget,
                direction=direction,
                spill_budget=spill_budget,
                coherence_floor=coherence_floor,
                target=target,
                layers=sets,
                scope=scopes,
                adaptive=adaptive,
                max_new_tokens=max_new_tokens,
                max_prompts=max_prompts,
                seed=seed,
                progress=progress,
                engine=where,
            )

    try:
        tuned = choose(vector, sets, scope, f"tuning {contrast.name}")
        if keep is not None:
            with progress_bar("weighing dimensions") as progress:
                case = Case(
                    lm, contrast, tuned, signs_of(direction), max_prompts=16, seed=seed
                )
                sparse = sparsify(case, keep, progress=progress)
            chosen = [list(sparse.layers)]
            tuned = choose(sparse, chosen, [str(sparse.scope)], f"tuning {keep:.0%} of it")
    except NoStrengthPasses as refusal:
        show(refusal.table(), full=full)
        write_result(json_file, {"refused": refusal.found, "tried": refusal.tried})
        raise
    show(tuned.table(), convert(tuned), full=full)
    if out is not None:
        tuned.save(out)
    if report is not None:
        write_page(report, [tune_section(tuned)], title="How hard to pull", lead=lm.name)
    write_result(json_file, tuned.to_dict())
