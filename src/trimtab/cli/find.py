"""`trimtab find`: a steering vector from a contrast, or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.app import Json, Model, Seed, app, complete_behavior
from trimtab.cli.engine import Address, EngineName, Workers, check_engine
from trimtab.cli.screen import Full, show
from trimtab.cli.sparse import Sparsify, check_share
from trimtab.cli.support import (
    check_writable,
    load_model,
    parse_layers,
    parse_position,
    progress_bar,
    write_result,
)
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.methods.each import Wanted
    from trimtab.models.model import LanguageModel
    from trimtab.passes.engine import Engine
    from trimtab.steering.vector import VectorSteering


@app.command(
    "find", epilog="Example: trimtab find harbor refusal -o refusal.safetensors --method next_token"
)
def find_command(
    model: Model,
    behavior: Annotated[
        str,
        typer.Argument(
            metavar="BEHAVIOR",
            help="A built-in name, or a YAML or JSONL file; several with commas between.",
            autocompletion=complete_behavior,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The steering file to write; a folder when there are several."
        ),
    ],
    method: Annotated[str, typer.Option(help="How to find it.")] = "mean_difference",
    layers: Annotated[
        str | None, typer.Option(help="Layers to steer, counted from 0: `2`, `2,5` or `2-5`.")
    ] = None,
    each_layer: Annotated[
        str | None,
        typer.Option(help="One vector of its own at each of these layers, `2,5` or 2-5."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Tokens to steer: all, last, prompt, post_instruction, generated, [a,b)."
        ),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(
            help="Where prompts are read: last, post_instruction, answer, judged_answer (answers that "
            "the judge calls toward, after the away prompt), k (the most telling of "
            "the last k positions) or -k (exactly that one)."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m to store; the method's own by default.")
    ] = None,
    keep: Sparsify = None,
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    full: Full = False,
    json_file: Json = None,
) -> None:
    """Find a steering vector for a behavior and write it as one file.

    Several behaviors (refusal,mood) or --each-layer give a folder with a file for each; --engine
    ray finds them side by side.
    """
    from trimtab.engine import open_engine
    from trimtab.mechanism.case import Case
    from trimtab.mechanism.sparse.sparsify import sparsify
    from trimtab.steering.load import describe
    from trimtab.steering.units import convert

    check_share(keep)
    check_engine(engine, ("local", "ray"))
    wanted = _wanted(behavior, method, layers, each_layer, scope, position, seed)
    several = each_layer is not None or len(wanted) > 1
    files = [out / f"{each.name}.safetensors" if several else out for each in wanted]
    check_writable(*files, json_file)

    lm = load_model(model)
    with open_engine(engine, lm, address=address, workers=workers) as where:
        vectors = _found(lm, wanted, where)
    for each, vector, file in zip(wanted, vectors, files, strict=True):
        kept = vector if strength is None else vector.at(strength)
        if keep is not None:
            with progress_bar("weighing dimensions") as progress:
                case = Case(lm, each.behavior, kept, max_prompts=16, seed=seed)
                kept = sparsify(case, keep, progress=progress)
        kept.save(file)
        show(convert(kept), title=f"{kept.label}, written to {file}", full=full)
    described = [{"file": str(file), **describe(file)} for file in files]
    write_result(json_file, {"files": described} if several else described[0])


def _found(lm: LanguageModel, wanted: Sequence[Wanted], engine: Engine) -> Sequence[VectorSteering]:
    from trimtab.methods.each import find_each, find_one

    if len(wanted) == 1:
        with progress_bar(f"finding {wanted[0].behavior.name}") as progress:
            return [find_one(lm, wanted[0], engine=engine, progress=progress)]
    with progress_bar(f"finding {len(wanted)} vectors") as progress:
        return find_each(lm, wanted, engine=engine, progress=progress)


def _wanted(
    behavior: str,
    method: str,
    layers: str | None,
    each_layer: str | None,
    scope: str | None,
    position: str | None,
    seed: int,
) -> list[Wanted]:
    """One entry per behavior and, with --each-layer, per layer."""
    from trimtab.behaviors.file import load_behavior
    from trimtab.methods.each import Wanted

    if layers is not None and each_layer is not None:
        raise TrimtabError(
            asked="--layers and --each-layer",
            found="two ways to choose layers",
            advice="use --layers for one vector over all of them, --each-layer for one at each",
        )
    names = [behavior] if Path(behavior).exists() else behavior.split(",")
    sets: list[tuple[int, ...] | None] = [None if layers is None else tuple(parse_layers(layers))]
    if each_layer is not None:
        sets = [(layer,) for layer in parse_layers(each_layer)]
    at = None if position is None else parse_position(position)
    return [
        Wanted(load_behavior(name.strip()), method, chosen, scope, at, seed)
        for name in names
        for chosen in sets
    ]
