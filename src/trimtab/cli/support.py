"""What the commands share: levers and layers from text, checked outputs, progress and tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab.cli.app import DEVICE_MAP
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    import torch

    from trimtab.models.model import LanguageModel
    from trimtab.steering.prompt import PromptSteering
    from trimtab.steering.vector import VectorSteering
    from trimtab.steering.weights import WeightSteering

# What users type before a lever's words, and the slot that it means.
LEVERS = {"prompt": "system", "prefix": "prefix", "suffix": "suffix"}


def parse_layers(text: str) -> list[int]:
    """Read `2`, `2,5` or `2-5` (both ends) as a list of layers.

    Raises:
        TrimtabError: for anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.strip().isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise TrimtabError(
                asked=f"the layers {text!r}",
                found=f"{part.strip()!r}",
                advice="write them as 2, as 2,5 or as 2-5, counted from 0",
            )
        layers.extend(range(int(ends[0]), int(ends[1]) + 1))
    return layers


def parse_position(text: str) -> str | int:
    """Read a number as a count of prompt positions; every other text stays a name."""
    try:
        return int(text)
    except ValueError:
        return text


def read_lever(text: str) -> VectorSteering | PromptSteering | WeightSteering:
    """Read `prompt:TEXT`, `prefix:TEXT`, `suffix:TEXT` or the path of a steering file."""
    from trimtab.steering.load import load_steering
    from trimtab.steering.prompt import prompt

    kind, colon, words = text.partition(":")
    if colon and kind in LEVERS:
        return prompt(words, LEVERS[kind])
    return load_steering(text)


def read_levers(
    given: Sequence[str] | None, strength: float | None
) -> list[VectorSteering | PromptSteering | WeightSteering]:
    """Read any number of levers; a strength is that of all but prompts."""
    from trimtab.steering.prompt import PromptSteering

    levers = [read_lever(text) for text in given or []]
    if strength is None:
        return levers
    return [each if isinstance(each, PromptSteering) else each.at(strength) for each in levers]


def read_vector(path: str | os.PathLike[str]) -> VectorSteering:
    """Read a steering file that must hold a vector."""
    from trimtab.steering.load import load_steering
    from trimtab.steering.prompt import PromptSteering
    from trimtab.steering.vector import VectorSteering

    lever = load_steering(path)
    if not isinstance(lever, VectorSteering):
        raise TrimtabError(
            asked=f"the vector in {os.fspath(path)}",
            found="a prompt, which has no strength to choose"
            if isinstance(lever, PromptSteering)
            else f"no vector but {lever.label}",
            advice="give a file that `trimtab find` wrote",
        )
    return lever


def load_model(name: str, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a model as `trimtab.load` does, saying so on a terminal: a download takes its time."""
    from trimtab.models.load import load

    quiet_libraries()
    with Console(stderr=True).status(f"loading {escape(name)}"):
        return load(name, dtype=dtype, device_map=os.environ.get(DEVICE_MAP))


def quiet_libraries() -> None:
    """Keep the libraries' bars and retries off stderr: one message of ours says what failed."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def check_writable(*targets: Path | None) -> None:
    """Refuse, before any work is done, files that could not be written at its end."""
    for target in targets:
        if target is None:
            continue
        parent = next(p for p in target.absolute().parents if p.exists())
        if target.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise TrimtabError(
                asked=f"to write {target}",
                found="a folder of that name"
                if target.is_dir()
                else f"no way to write in {parent}",
                advice="choose a file in a folder you may write",
            )


def write_result(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the JSON that was asked for, if it was."""
    if path is not None:
        from trimtab.results.tables import write_json

        write_json(path, data)


def in_short(value: object) -> str:
    """Write a value from a steering file on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def stdout_console() -> Console:
    """Return the console of stdout, for what is no table."""
    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, on a terminal only."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
