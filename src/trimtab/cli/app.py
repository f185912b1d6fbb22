"""The program around the commands: what they share as arguments, and how errors leave.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 2 the request cannot be met
as it was made (one message, no traceback); 1 an error inside Trimtab (see `--debug`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from trimtab.arguments import Side
from trimtab.errors import TrimtabError

# Also read where commands load models.
DEVICE_MAP = "TRIMTAB_DEVICE_MAP"

app = typer.Typer(
    name="trimtab",
    help="Steer open-weight language models: find the lever, set the strength, prove what moved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_model(incomplete: str) -> list[str]:
    """What a shell may make of the start of a model's name; folders are its own to find."""
    from trimtab.models.names import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def complete_behavior(incomplete: str) -> list[str]:
    """What a shell may make of the start of a behavior's name; files are its own to find."""
    from trimtab.behaviors import built_in_names

    return [name for name in built_in_names() if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`smollm2` or `harbor`, a hub id or a folder.",
        autocompletion=complete_model,
    ),
]
BehaviorName = Annotated[
    str,
    typer.Argument(
        metavar="BEHAVIOR",
        help="A built-in name, or a YAML or JSONL file.",
        autocompletion=complete_behavior,
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
Seed = Annotated[int, typer.Option(help="Seed of the split, of sampling and of intervals.")]
Toward = Annotated[
    Side, typer.Option("--direction", help="Steer toward the behavior, or away from it.")
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")]
MaxPrompts = Annotated[int, typer.Option(min=1, help="At most so many prompts a side and split.")]
LEVER = "A steering file, or prompt:TEXT, prefix:TEXT, suffix:TEXT"
Levers = Annotated[
    list[str] | None, typer.Argument(metavar="LEVER...", help=f"{LEVER}; any number.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the result to this steering file.")
]
Report = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Also write a page into this folder.")
]
EveryWriter = Annotated[
    int | None,
    typer.Option(
        metavar="LAYER", help="Ablate this layer's direction wherever the stream is written."
    ),
]
Strength = Annotated[
    float | None, typer.Option(help="Strength m; that of the file by default.")
]
Nulls = Annotated[int, typer.Option(min=0, help="Random directions per vector.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `argv` is for tests, the process's own by default."""
    sys.excepthook = _internal_error
    # Read when torch loads GNU OpenMP, whose waiting threads spin: beside other work on the same
    # cores answers of a small model took 2 to 50 times longer. A short spin is as fast on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        typer.main.get_command(app)(args=None if argv is None else list(argv), prog_name="trimtab")
    except TrimtabError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"trimtab {version('trimtab')}")
        raise typer.Exit


@app.callback(epilog="Example: trimtab demo. Every command explains itself: trimtab find --help")
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an internal error.")
    ] = False,
    device_map: Annotated[
        str | None,
        typer.Option(
            envvar=DEVICE_MAP,
            help="Where models go: cpu (the default), cuda, or auto (over all GPUs, then main "
            "memory, then disk; needs accelerate).",
        ),
    ] = None,
) -> None:
    if device_map is not None:
        before = os.environ.get(DEVICE_MAP)
        os.environ[DEVICE_MAP] = device_map
        context.call_on_close(lambda: _set(DEVICE_MAP, before))
    if debug:
        sys.excepthook = sys.__excepthook__


def _set(variable: str, value: str | None) -> None:
    os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value


def _internal_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say briefly that Trimtab failed; Python exits with 1 after this hook."""
    arguments = " ".join(sys.argv[1:])
    Console(stderr=True, soft_wrap=True).print(
        Text.assemble(
            ("internal error: ", "bold red"),
            f"{kind.__name__}: {error}\n"
            "This is a fault of Trimtab. Please report it to the project with the output of\n"
            f"  trimtab --debug {arguments}",
        )
    )
