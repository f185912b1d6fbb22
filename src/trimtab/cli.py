"""The command line: each command reads arguments, calls one public function, shows the result.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 2 the request cannot be met
as it was made (one message, no traceback); 1 an error inside Trimtab (see `--debug`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from trimtab import __version__
from trimtab.behavior import load_behavior
from trimtab.cli_support import (
    check_writable,
    in_short,
    load_model,
    parse_layers,
    parse_position,
    progress_bar,
    quiet_libraries,
    read_lever,
    show,
    stdout_console,
    write_result,
)
from trimtab.demo import ALL_BEHAVIORS, BEHAVIORS, run_demo
from trimtab.errors import TrimtabError
from trimtab.find import METHODS, find
from trimtab.measure import judge_for, measure
from trimtab.report import write_svg
from trimtab.report.terminal import behavior_panel
from trimtab.steering import PromptSteering, VectorSteering
from trimtab.steering_file import describe
from trimtab.strength import convert
from trimtab.tables import Table, clean
from trimtab.weights import bake

app = typer.Typer(
    name="trimtab",
    help="Steer open-weight language models: find the lever, set the strength, prove what moved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="`harbor` (built in), a hub id or a folder.")
]
BehaviorName = Annotated[
    str, typer.Argument(metavar="BEHAVIOR", help="A built-in name, or a YAML or JSONL file.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
Seed = Annotated[int, typer.Option(help="Of everything random: the split, sampling, intervals.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `argv` is for tests, the process's own by default."""
    sys.excepthook = _internal_error
    try:
        typer.main.get_command(app)(args=None if argv is None else list(argv), prog_name="trimtab")
    except TrimtabError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: trimtab demo")
def _options(
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
) -> None:
    if debug:
        sys.excepthook = sys.__excepthook__


@app.command(
    "find", epilog="Example: trimtab find harbor refusal -o refusal.safetensors --method next_token"
)
def find_command(
    model: Model,
    behavior: BehaviorName,
    out: Annotated[Path, typer.Option("--out", "-o", help="The steering file to write.")],
    method: Annotated[str, typer.Option(help="How to find it.")] = "mean_difference",
    layers: Annotated[
        str | None, typer.Option(help="Layers to steer, counted from 0: `2`, `2,5` or `2-5`.")
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
            help="Where prompts are read: last, post_instruction, answer, k (the most telling of "
            "the last k positions) or -k (exactly that one)."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m to store; the method's own by default.")
    ] = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Find a steering vector for a behaviour and write it as one file."""
    check_writable(out, json_file)
    chosen = None if layers is None else parse_layers(layers)

    contrast = load_behavior(behavior)
    lm = load_model(model)
    options: dict[str, Any] = {} if position is None else {"position": parse_position(position)}
    if method in METHODS and "judge" in METHODS[method].options and contrast.judge is not None:
        options["judge"] = judge_for(contrast)  # wanted answers must show the behaviour
    with progress_bar(f"finding {contrast.name}") as progress:
        vector = find(
            lm,
            contrast,
            method,
            layers=chosen,
            scope=scope,
            seed=seed,
            progress=progress,
            **options,
        )
    if strength is not None:
        vector = vector.at(strength)
    vector.save(out)
    show(convert(vector), f"{vector.label}, written to {out}")
    write_result(json_file, {"file": str(out), **describe(out)})


@app.command("generate", epilog='Example: trimtab generate harbor "Where is the ferry?"')
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The user's turn.")],
    files: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="A steering file; may be given again."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m of every file; as stored by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Tokens = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Answer a prompt, steered by any number of files."""
    check_writable(json_file)

    levers: list[VectorSteering | PromptSteering] = [read_lever(str(path)) for path in files or []]
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


@app.command(
    "measure",
    epilog='Example: trimtab measure harbor refusal refusal.safetensors prompt:"Refuse politely."',
)
def measure_command(
    model: Model,
    behavior: BehaviorName,
    levers: Annotated[
        list[str] | None,
        typer.Argument(metavar="LEVER...", help="Steering files, or prompt:TEXT."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength m of every vector; as stored by default.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A second model, measured like a lever: a baked folder.")
    ] = None,
    nulls: Annotated[int, typer.Option(min=0, help="Random directions per vector.")] = 3,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts a side.")
    ] = None,
    max_new_tokens: Tokens = 40,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Measure levers side by side on held-out prompts, with nulls and intervals."""
    check_writable(json_file)

    contrast = load_behavior(behavior)
    chosen = [read_lever(lever) for lever in levers or []]
    if strength is not None:
        chosen = [c.at(strength) if isinstance(c, VectorSteering) else c for c in chosen]
    lm = load_model(model)
    other = None if checkpoint is None else load_model(checkpoint)
    with progress_bar(f"measuring {contrast.name}") as progress:
        result = measure(
            lm,
            contrast,
            chosen,
            nulls=nulls,
            max_new_tokens=max_new_tokens,
            max_prompts=max_prompts,
            seed=seed,
            checkpoint=other,
            progress=progress,
        )
    show(result)
    write_result(json_file, result.to_dict())


@app.command("bake", epilog="Example: trimtab bake harbor refusal.safetensors -o refusing-harbor")
def bake_command(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file with a vector.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to create.")],
    strength: Annotated[
        float | None, typer.Option(help="Strength m to bake; as stored by default.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Write a checkpoint that steers itself, or refuse and say why."""
    check_writable(out / "config.json", json_file)

    vector = read_lever(str(file))
    if not isinstance(vector, VectorSteering):
        raise TrimtabError(
            asked=f"to bake {file}",
            found="a prompt, which has no place in the weights",
            advice="bake a vector; a prompt goes into the system message",
        )
    report = bake(load_model(model), vector if strength is None else vector.at(strength), out)
    show(report)
    write_result(json_file, report.to_dict())


@app.command("inspect", epilog="Example: trimtab inspect refusal.safetensors")
def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A steering file.")],
    json_file: Json = None,
) -> None:
    """Say what a steering file holds: its origin, its layers and its strength in every unit."""
    check_writable(json_file)

    facts = describe(file)
    shown = [
        (name.replace("_", " "), in_short(value))
        for name, value in facts.items()
        if name not in ("alphas", "norms", "class_gaps", "spreads")
    ]
    show(Table(str(file), ("what", "value"), tuple(shown)))
    lever = read_lever(str(file))
    if isinstance(lever, VectorSteering):
        show(convert(lever))
    write_result(json_file, facts)


@app.command("demo", epilog="Example: trimtab demo --out report")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    every: Annotated[bool, typer.Option("--all", help="All seven built-in behaviours.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the figures as one SVG file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Steer the built-in model, measure it, bake it, and write a report that opens offline."""
    check_writable(out / "index.html", picture, json_file)

    quiet_libraries()
    console = stdout_console()
    with progress_bar("steering") as progress:
        data = run_demo(
            out,
            ALL_BEHAVIORS if every else BEHAVIORS,
            progress,
            tell=lambda name, entry: console.print(behavior_panel(name, entry)),
        )
    if picture is not None:
        write_svg(picture, data)
    console.print(Text(f"{out / 'index.html'}, {out / 'demo.json'}: {data['seconds']:.0f} s"))
    write_result(json_file, data)


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
