"""`trimtab generate`: an answer, steered or not."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.arguments import MAX_NEW_TOKENS
from trimtab.cli.app import Json, Model, Seed, Strength, Tokens, app
from trimtab.cli.support import check_writable, load_model, read_lever, write_result

if TYPE_CHECKING:
    from trimtab.steering.vector import Steering


@app.command("generate", epilog='Example: trimtab generate harbor "Where is the ferry?"')
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The user's turn.")],
    files: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="A steering file; may be given again."),
    ] = None,
    strength: Strength = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Answer a prompt, steered by any number of files."""
    from trimtab.results.tables import clean
    from trimtab.steering.prompt import PromptSteering

    check_writable(json_file)
    levers: list[Steering] = [read_lever(str(path)) for path in files or []]
    if strength is not None:
        levers = [lever.at(strength) for lever in levers]
    if system is not None:
        levers.append(PromptSteering(system))
    lm = load_model(model)
    with ExitStack() as stack:
        for lever in levers:
            stack.enter_context(lever.on(lm))
        answer = lm.generate(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    typer.echo(clean(answer))
    write_result(
        json_file,
        {
            "model": lm.name,
            "fingerprint": lm.fingerprint,
            "prompt": prompt,
            "levers": [lever.label for lever in levers],
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "answer": answer,
        },
    )
