"""`trimtab convert`: one lever as another, and what that loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, Side
from trimtab.cli.app import BehaviorName, Json, MaxPrompts, Model, Seed, Strength, Tokens, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import check_writable, load_model, read_lever, write_result

if TYPE_CHECKING:
    from trimtab.levers.conversions.conversion import Conversion
    from trimtab.models.model import LanguageModel


KINDS = ("vector", "prompt", "soft", "rank-1", "bias", "ablation")


@app.command(
    "convert",
    epilog="Example: trimtab convert harbor refusal refusal.safetensors --to rank-1 -o rank1.safetensors",
)
def convert_command(
    model: Model,
    behavior: BehaviorName,
    lever: Annotated[
        str,
        typer.Argument(
            metavar="LEVER", help="A steering file, or prompt:TEXT, prefix:TEXT, suffix:TEXT."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(KINDS),
            help="Prompts and low-rank updates become vectors; a vector the rest.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The steering file to write; of bias and ablation a model's folder."
        ),
    ] = None,
    strength: Strength = None,
    direction: Annotated[
        Side | None, typer.Option(help="Where the strength goes by default.")
    ] = None,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    seed: Seed = 0,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Turn a lever into another; what is lost is said first.

    Fitted on train prompts, reported on test prompts: the residual, and the share of the lever's effect
    that the new one recovers.
    """
    import torch

    from trimtab.behaviors.file import load_behavior
    from trimtab.levers import convert

    folder = to in ("bias", "ablation")
    check_writable(out / "config.json" if out is not None and folder else out, json_file)
    contrast, given = load_behavior(behavior), read_lever(lever)
    given = given if strength is None else given.at(strength)
    lm = load_model(model, dtype=torch.float32)
    done = convert(
        lm,
        contrast,
        given,
        to,
        direction=direction,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    show(done, full=full)
    for path in [] if out is None else _write(lm, done, out, folder):
        typer.echo(f"wrote {path}")
    write_result(json_file, done.to_dict())


def _write(lm: LanguageModel, done: Conversion, out: Path, folder: bool) -> list[Path]:
    """Write a checkpoint, one steering file, or one for each of several vectors that are one lever."""
    from trimtab.steering.together import Together
    from trimtab.weights import bake

    lever = done.lever
    if folder:
        return [bake(lm, lever, out).path]
    if isinstance(lever, Together):
        return [v.save(out.with_suffix(f".{v.site}{out.suffix}")) for v in lever.vectors]
    return [lever.save(out)]
