"""The options that say where a command does its work."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from trimtab.errors import TrimtabError

EngineName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Where work is done: local; ray (workers that hold the model); vllm (answers).",
    ),
]
Address: TypeAlias = Annotated[
    str | None,
    typer.Option(help="With --engine ray: a cluster's address; one on this machine by default."),
]
Workers: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="With --engine ray: processes that hold the model at a time."),
]


def check_engine(name: str, known: tuple[str, ...] | None = None) -> None:
    """Refuse, before a model is loaded, an engine that is unknown or of no use to a command.

    Raises:
        TrimtabError: with the engines that there are.
    """
    from trimtab.checks import choice
    from trimtab.engine import ENGINES

    choice("engine", name, ENGINES)
    if known is not None and name not in known:
        raise TrimtabError(
            asked=f"--engine {name}",
            found="work that this engine does not do",
            advice=f"use one of {', '.join(known)}",
        )
