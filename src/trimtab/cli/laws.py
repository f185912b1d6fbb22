"""`trimtab laws`: the theory of steering strength, and how far it holds on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from trimtab.cli.app import Json, Seed, Tokens, app, complete_behavior, complete_model
from trimtab.cli.screen import show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_vector,
    stdout_console,
    write_result,
)
from trimtab.errors import TrimtabError


@app.command("laws", epilog="Example: trimtab laws harbor refusal v.safetensors --out laws")
def laws_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL",
            help="`harbor` (built in), a hub id or a folder; without it, the theory alone.",
            autocompletion=complete_model,
        ),
    ] = None,
    behavior: Annotated[
        str | None,
        typer.Argument(
            metavar="BEHAVIOR",
            help="A built-in name, or a YAML or JSONL file.",
            autocompletion=complete_behavior,
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE]", help="A steering file with a vector.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the page.")] = Path(
        "laws"
    ),
    away: Annotated[bool, typer.Option("--away", help="Study negative strengths.")] = False,
    max_prompts: Annotated[int, typer.Option(min=1, help="At most so many prompts a side.")] = 16,
    max_new_tokens: Tokens = 40,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Draw the laws of steering strength; with a model and a vector, prediction against measurement."""
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.prediction.study import study
    from trimtab.report.laws_page import write_laws_page
    from trimtab.report.strength_sections import study_sections
    from trimtab.report.theory import theory_section
    from trimtab.theory.features_model import FeaturesModel
    from trimtab.theory.theorems import theorems

    check_writable(out / "index.html", json_file)
    if model is not None and (behavior is None or file is None):
        raise TrimtabError(
            asked=f"the laws on {model}",
            found="no behavior or no steering file",
            advice="give MODEL BEHAVIOR FILE, or none of them for the theory alone",
        )
    theory = theorems(FeaturesModel.example())
    sections, lead = [theory_section(theory)], "theory"
    data: dict[str, Any] = {"theory": theory.to_dict()}
    if model is not None and behavior is not None and file is not None:
        contrast, vector = load_behavior(behavior), read_vector(file)
        # Divergences of a thousandth of a nat are read, which half precision would drown.
        lm = load_model(model, dtype=torch.float32)
        with progress_bar(f"studying {contrast.name}") as progress:
            found = study(
                lm,
                contrast,
                vector,
                sign=-1 if away else 1,
                max_prompts=max_prompts,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            )
        sections = [*study_sections(found), *sections]
        lead, data = f"{lm.name}, {contrast.name}", {"study": found.to_dict(), **data}
        show(found)
    else:
        show(theory)
    write_laws_page(out, sections, title="How hard to pull", lead=lead)
    write_result(json_file, data)
    stdout_console().print(Text(str(out / "index.html")))
