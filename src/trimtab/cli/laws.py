"""`trimtab laws`: how far the theory of steering strength holds on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Seed, Tokens, Toward, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import (
    check_writable,
    load_model,
    progress_bar,
    read_vector,
    stdout_console,
    write_result,
)


@app.command("laws", epilog="Example: trimtab laws harbor refusal v.safetensors --out laws")
def laws_command(
    model: Model,
    behavior: BehaviorName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file with a vector.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the page.")] = Path(
        "laws"
    ),
    direction: Toward = "toward",
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    seed: Seed = 0,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Compare what the laws of steering strength predict for a vector with what the model does."""
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.prediction.laws import laws
    from trimtab.report.page import write_page
    from trimtab.report.strength_sections import laws_sections

    check_writable(out / "index.html", json_file)
    contrast, vector = load_behavior(behavior), read_vector(file)
    # Divergences of a thousandth of a nat are read, which half precision would drown.
    lm = load_model(model, dtype=torch.float32)
    with progress_bar(f"laws of {contrast.name}") as progress:
        found = laws(
            lm,
            contrast,
            vector,
            direction=direction,
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    # Files first: a reader that closes the pipe early should not cost them.
    write_result(json_file, found.to_dict())
    lead = f"{lm.name}, {contrast.name}"
    write_page(out, laws_sections(found), title="How hard to pull", lead=lead)
    show(found, full=full)
    stdout_console().print(Text(str(out / "index.html")))
