"""Tasks of the evaluation harness lm-eval: its own, and those of a folder."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from trimtab.errors import TrimtabError

Loaded: TypeAlias = "dict[str, Any]"


def load_tasks(names: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> Loaded:
    """Load tasks with their data: `tasks`, `groups` and `group_map` of the harness.

    Raises:
        TrimtabError: no or unknown names; a folder that is missing; data that cannot be read.
    """
    if isinstance(names, str) or not names:
        raise TrimtabError(
            asked=f"to measure the tasks {names!r}",
            found="no list of names",
            advice="give at least one name, such as ['arc_easy']",
        )
    folder = None if include_path is None else os.fspath(include_path)
    if folder is not None and not os.path.isdir(folder):
        raise TrimtabError(
            asked=f"the tasks below {folder}", found="no such folder", advice="give a folder"
        )
    manager = _manager(names, folder)
    for name in names:
        if name not in manager.all_tasks and not os.path.isfile(name):
            near = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise TrimtabError(
                asked=f"the task {name!r}",
                found=f"near it: {', '.join(near)}" if near else "no task of that name",
                advice="`lm-eval ls tasks` lists them; give your own folder as include_path "
                "(--include-path)",
            )
    try:
        try:
            return manager.load(list(names))
        except FileNotFoundError:
            if folder is None:
                raise
            with _inside(folder):
                return manager.load(list(names))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrimtabError(
            asked=f"to load {', '.join(names)}",
            found=f"{type(error).__name__}: {error}",
            advice="check the task's file, its data and the network",
        ) from error


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """The harness's index of tasks; its own ones take seconds to read, so only where needed."""
    make = importlib.import_module("lm_eval.tasks").TaskManager
    if folder is not None:
        own = make(include_path=folder, include_defaults=False)
        # A group may hold tasks of the harness.
        if set(names) <= set(own.all_tasks) - set(own.all_groups):
            return own
    return make(include_path=folder)


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Make a folder the current one, for data files that are named relative to it."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def set_examples(task: Any, fewshot: int | None, seed: int) -> None:
    """Set a task's number of worked examples as the harness itself does: a zero of its own stays."""
    given = task.get_config("num_fewshot")
    if fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def members(loaded: Loaded) -> dict[str, list[str]]:
    """Return task or group -> the tasks whose documents its figure is taken over."""
    groups = loaded.get("groups", {})
    found = {name: [name] for name in loaded["tasks"]}
    return found | {
        name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()
    }
