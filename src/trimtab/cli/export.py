"""`trimtab export`: steering for other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import EveryWriter, Model, Strength, app
from trimtab.cli.support import check_writable, load_model, read_lever, read_vector
from trimtab.errors import TrimtabError


class Form(str, Enum):
    """What can be written."""

    gguf = "gguf"
    peft = "peft"
    lm_eval = "lm-eval"


@app.command(
    "export", epilog="Example: trimtab export harbor mood.safetensors --to gguf -o mood.gguf"
)
def export_command(
    model: Model,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A steering file; for PEFT a low-rank one too.")
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="A llama.cpp control vector, a PEFT adapter, or the file of lm-eval's `steered`."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, or PEFT folder, to create.")],
    strength: Strength = None,
    every_writer: EveryWriter = None,
) -> None:
    """Write steering in a form that another program reads, or refuse and say why."""
    from trimtab.export import write_gguf, write_lm_eval, write_peft
    from trimtab.steering.weights import WeightSteering
    from trimtab.weights import at_every_writer

    check_writable(out / "adapter_config.json" if to is Form.peft else out)
    weights = read_lever(str(file)) if to is Form.peft else None
    if isinstance(weights, WeightSteering) and every_writer is None:
        write_peft(load_model(model), weights if strength is None else weights.at(strength), out)
        typer.echo(f"wrote {out}")
        return
    vector = read_vector(file)
    vector = vector if strength is None else vector.at(strength)
    if every_writer is not None and to is not Form.peft:
        raise TrimtabError(
            asked=f"to export {file} at every writer to {to.value}",
            found="a form that holds no projections of the weights",
            advice="use --to peft, or trimtab bake",
        )
    lm = load_model(model)
    vector.check(lm)
    if to is Form.gguf:
        write_gguf(vector, out, model_hint=lm.model.config.model_type)
    elif to is Form.lm_eval:
        write_lm_eval(lm, vector, out)
    else:
        parts = [vector] if every_writer is None else at_every_writer(vector, every_writer)
        write_peft(lm, parts, out)
    typer.echo(f"wrote {out}")
