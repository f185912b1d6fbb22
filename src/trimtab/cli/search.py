"""`trimtab search`: a prompt that does what a reference prompt does, in other words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.app import BehaviorName, Json, Model, Seed, app
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import show
from trimtab.cli.support import check_writable, load_model, progress_bar, write_result

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel
    from trimtab.prompts.soft.states import StateSweep
    from trimtab.prompts.task.references import Reference
    from trimtab.prompts.task.requests import Requests


@app.command("search", epilog="Example: trimtab search harbor topic -o p.safetensors")
def search_command(
    model: Model,
    behavior: BehaviorName,
    reference: Annotated[
        str | None,
        typer.Option(help="The prompt to match; the behavior's prompt_toward by default."),
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(help="Requests: harbor, or a YAML or text file; the behavior's by default."),
    ] = None,
    slot: Annotated[
        str, typer.Option(help="Where the prompt stands: prefix or suffix.")
    ] = "prefix",
    restarts: Annotated[int, typer.Option(min=1, help="Restarts of each arm.")] = 10,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run other searches on as many tokens, to compare."),
    ] = False,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt; the reference's by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of HotFlip in each descent.")] = 16,
    journal: Annotated[
        Path | None, typer.Option(help="File of finished steps; a killed search goes on from it.")
    ] = None,
    states: Annotated[
        bool,
        typer.Option("--states", help="Also match the reference's states at every layer."),
    ] = False,
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the found prompt to this file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page into this folder.")] = None,
    json_file: Json = None,
) -> None:
    """Find a prompt that makes the model answer as the reference does, without its words.

    Validation requests choose among the restarts; the figures are those of the test requests.
    """
    import torch

    from trimtab.behaviors.behavior import load_behavior
    from trimtab.engine import open_engine
    from trimtab.prompts.search import search
    from trimtab.prompts.task.references import reference_of
    from trimtab.prompts.task.requests import behavior_requests, load_requests
    from trimtab.report.laws_page import write_laws_page
    from trimtab.report.search_page import search_sections

    page = None if report is None else report / "index.html"
    check_writable(out, json_file, page, journal)
    check_engine(engine, ("local", "ray"))
    contrast = load_behavior(behavior)
    wanted = reference_of(contrast, reference)
    split = behavior_requests(contrast, seed) if requests is None else load_requests(requests, seed)
    # Losses are compared to a millionth of a nat, which half precision would drown.
    lm = load_model(model, dtype=torch.float32)
    with (
        open_engine(engine, lm, address=address, workers=workers) as where,
        progress_bar(f"searching {wanted.name}") as progress,
    ):
        found = search(
            lm,
            wanted,
            split,
            slot=slot,
            restarts=restarts,
            compare=compare,
            length=length,
            repair_steps=steps,
            flip_steps=steps,
            seed=seed,
            journal=journal,
            progress=progress,
            engine=where,
        )
    show(found)
    show(found.scores["chosen"])
    sweep = _sweep(lm, wanted, split, slot, seed) if states else None
    if sweep is not None:
        show(sweep)
    if out is not None:
        found.lever.save(out)
    if report is not None:
        sections = search_sections(found, sweep)
        write_laws_page(report, sections, title="Prompt search", lead=lm.name)
    write_result(json_file, found.to_dict())


def _sweep(
    lm: LanguageModel, reference: Reference, requests: Requests, slot: str, seed: int
) -> StateSweep:
    """Match the reference's states at every layer, on a few training requests."""
    import torch

    from trimtab.prompts.pipeline.task import Settings
    from trimtab.prompts.soft.states import match_every_layer
    from trimtab.prompts.task.rows import slot_ids
    from trimtab.prompts.task.teacher import teacher_rows
    from trimtab.steering.prompt import prompt

    lever = prompt(reference.text, slot)
    rows = teacher_rows(lm, lever, requests.train[: Settings.train_requests])
    generator = torch.Generator().manual_seed(seed)
    with progress_bar("matching states") as progress:
        return match_every_layer(
            lm,
            rows,
            slot_ids(lm, lever.text, rows[0]),
            generator=generator,
            progress=progress,
        )
