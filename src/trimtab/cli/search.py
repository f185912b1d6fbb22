"""`trimtab search`: a prompt that does what a reference prompt does, in other words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.app import BehaviorName, Json, Model, Out, Report, Seed, app
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import Full, show
from trimtab.cli.support import check_writable, load_model, progress_bar, write_result
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.model import LanguageModel
    from trimtab.prompts.soft.states import StateSweep
    from trimtab.prompts.task.references import ReferencePrompt
    from trimtab.prompts.task.requests import Requests

SOFT_LENGTH = 4  # vectors along a direction


@app.command("search", epilog="Example: trimtab search harbor topic -o p.safetensors")
def search_command(
    model: Model,
    behavior: BehaviorName,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The prompt to match, or harbor:NAME; the behavior's prompt_toward by default."
        ),
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
    repair_steps: Annotated[int, typer.Option(min=0, help="Steps of HotFlip in each repair.")] = 16,
    flip_steps: Annotated[
        int, typer.Option(min=1, help="With --compare: steps of HotFlip alone in each descent.")
    ] = 16,
    journal: Annotated[
        Path | None, typer.Option(help="File of finished steps; a killed search continues from it.")
    ] = None,
    states: Annotated[
        bool,
        typer.Option("--states", help="Also match the reference's states at every layer."),
    ] = False,
    along: Annotated[
        Path | None,
        typer.Option(help="Instead train a soft prompt along the vector in this file."),
    ] = None,
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    out: Out = None,
    report: Report = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Find a prompt that makes the model answer as the reference does, without its words.

    Validation requests choose among the restarts; the figures are those of the test requests. With
    --along no reference is matched: trained vectors move the state along the given vector.
    """
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.engine import open_engine
    from trimtab.prompts.search import search
    from trimtab.prompts.task.references import reference_of
    from trimtab.prompts.task.requests import behavior_requests, load_requests
    from trimtab.report.page import write_page
    from trimtab.report.search_page import search_sections

    page = None if report is None else report / "index.html"
    check_writable(out, json_file, page, journal)
    check_engine(engine, ("local", "ray"))
    contrast = load_behavior(behavior)
    split = behavior_requests(contrast, seed) if requests is None else load_requests(requests, seed)
    if along is not None:
        matching = {
            "reference": reference,
            "compare": compare,
            "journal": journal,
            "states": states,
        }
        ignored = [f"--{name}" for name, given in matching.items() if given]
        if ignored:
            raise TrimtabError(
                asked=f"--along with {', '.join(ignored)}",
                found="no reference to match along a direction",
                advice="leave one of them out",
            )
        _raise(model, contrast, split, along, slot, length, seed, out, report, full, json_file)
        return
    wanted = reference_of(contrast, reference)
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
            repair_steps=repair_steps,
            flip_steps=flip_steps,
            seed=seed,
            journal=journal,
            progress=progress,
            engine=where,
        )
    sweep = _sweep(lm, wanted, split, slot, seed) if states else None
    show(found, found.scores["chosen"], *([] if sweep is None else [sweep]), full=full)
    if out is not None:
        found.lever.save(out)
    if report is not None:
        sections = search_sections(found, sweep)
        write_page(report, sections, title="Prompt search", lead=lm.name)
    write_result(json_file, found.to_dict())


def _raise(
    model: str,
    behavior: Behavior,
    requests: Requests,
    path: Path,
    slot: str,
    length: int | None,
    seed: int,
    out: Path | None,
    report: Path | None,
    full: bool,
    json_file: Path | None,
) -> None:
    """Train a soft prompt that raises the projection on a vector, on a few training requests."""
    import torch

    from trimtab.prompts.pipeline.task import Settings
    from trimtab.prompts.soft.direction import raise_projection
    from trimtab.prompts.task.rows import lay_out
    from trimtab.report.page import Section, write_page
    from trimtab.steering.load import load_steering
    from trimtab.steering.vector import VectorSteering

    vector = load_steering(path)
    if not isinstance(vector, VectorSteering):
        raise TrimtabError(
            asked=f"a soft prompt along {path}",
            found="a prompt, which has no direction",
            advice="give a file that find or tune wrote",
        )
    lm = load_model(model, dtype=torch.float32)
    rows = lay_out(lm, requests.train[: Settings.train_requests], slot)
    with progress_bar(f"along {vector.label}") as progress:
        found = raise_projection(
            lm,
            rows,
            vector,
            length or SOFT_LENGTH,
            generator=torch.Generator().manual_seed(seed),
            behavior=behavior if behavior.readout is not None else None,
            progress=progress,
        )
    show(found, full=full)
    if out is not None:
        found.lever(lm, slot).save(out)
    if report is not None:
        section = Section(f"Along {vector.label}", tables=(found.table(),))
        write_page(report, [section], title="Soft prompt along a direction", lead=lm.name)
    write_result(json_file, found.to_dict())


def _sweep(
    lm: LanguageModel, reference: ReferencePrompt, requests: Requests, slot: str, seed: int
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
