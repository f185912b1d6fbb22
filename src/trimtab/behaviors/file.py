"""Reads behavior files (docs/behaviors.md) and names file and line of whatever is wrong in one."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.jsonl import read_jsonl
from trimtab.behaviors.located import Located, nearest, read_text, refuse_at
from trimtab.behaviors.parts import BehaviorError, Location, describe
from trimtab.behaviors.yaml import read_yaml
from trimtab.errors import TrimtabError

BUILT_IN = Path(__file__).parent.parent / "harbor" / "behaviors"  # plain data: nothing is imported


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Readout(_Strict):
    toward: list[StrictStr]
    away: list[StrictStr]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="allow")  # a judge's options are its own
    kind: StrictStr


class _Content(_Strict):
    """The keys of a behavior file; prompts are checked when the Behavior is built."""

    name: StrictStr | None = None
    description: StrictStr = ""
    toward: list[Any] = Field(default=...)
    away: list[Any] = Field(default=...)
    neutral: list[Any] = []
    requests: list[Any] = []
    readout: _Readout | None = None
    judge: _Spec | None = None
    coherence: _Spec | None = None
    prompt_toward: StrictStr | None = None
    prompt_away: StrictStr | None = None
    paired: StrictBool | None = None


def load_behavior(name_or_path: str | PathLike[str]) -> Behavior:
    """Load a built-in behavior by name, or a `.yaml`, `.yml` or `.jsonl` file.

    Raises:
        TrimtabError: no such name or file, or a file that is not a behavior, with `file:line`.
    """
    if not isinstance(name_or_path, str | PathLike) or not str(name_or_path).strip():
        raise TrimtabError(
            f"the behavior {name_or_path!r}",
            f"a {type(name_or_path).__name__}" if name_or_path != "" else "an empty name",
            "give the name of a built-in behavior, or a path",
        )
    path = _find(name_or_path)
    reader = read_jsonl if path.suffix == ".jsonl" else read_yaml
    located = reader(read_text(path), path)
    return _build(located, path)


def built_in_names() -> list[str]:
    """Return the names of the built-in behaviors."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def _find(name_or_path: str | PathLike[str]) -> Path:
    path = Path(name_or_path)
    built_in = BUILT_IN / f"{path}.yaml"
    bare = isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix
    if bare and built_in.is_file():
        return built_in
    if path.suffix in (".yaml", ".yml", ".jsonl") and path.is_file():
        return path
    if path.exists():
        what = "a folder" if path.is_dir() else f"a file ending in {path.suffix or 'nothing'!r}"
        advice = "give a file that ends in .yaml, .yml or .jsonl (docs/behaviors.md)"
    elif bare:
        what = "no built-in behavior of that name"
        advice = f"{nearest(path.name, built_in_names())}; or give the path of a YAML or JSONL file"
    else:
        what = "no such file"
        advice = f"check the path, or name a built-in behavior: {', '.join(built_in_names())}"
    raise TrimtabError(f"the behavior {str(name_or_path)!r}", what, advice)


def _build(located: Located, path: Path) -> Behavior:
    if not isinstance(located.content, dict):
        found = f"a {type(located.content).__name__} where keys and values were expected"
        raise refuse_at(path, 1, found, "start with name:, toward: and away:")
    try:
        content = _Content.model_validate(located.content)
    except ValidationError as error:
        raise _first(error, located, path) from error
    values = content.model_dump(exclude_unset=True)
    try:
        return Behavior(**{**values, "name": content.name or path.stem})
    except BehaviorError as error:
        line = located.line(error.location)
        found = f"{describe(error.location)}: {error.found}"
        raise refuse_at(path, line, found, error.advice) from error


def _first(error: ValidationError, located: Located, path: Path) -> TrimtabError:
    """Turn pydantic's complaint that helps most into one in our words, with its line.

    An unknown key comes first: it is often the reason why another one is missing.
    """
    problems = sorted(
        error.errors(),
        key=lambda e: (e["type"] != "extra_forbidden", located.line(tuple(e["loc"]))),
    )
    problem, more = problems[0], len(problems) - 1
    where: Location = tuple(problem["loc"])
    key, kind, given = describe(where), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        model = _Readout if where[0] == "readout" else _Content
        found, advice = f"unknown key {key!r}", nearest(str(where[-1]), list(model.model_fields))
    elif kind == "missing":
        found, advice = f"no {key!r}", "give both toward: and away:, each a list"
        advice = "name its kind: {kind: ...}" if where[-1] == "kind" else advice
    else:
        shown = repr(given) if len(repr(given)) <= 60 else repr(given)[:57] + "..."
        found = f"{key} is {shown}"
        wants = {
            "string_type": "text (put it in quotes)",
            "list_type": "a list",
            "bool_type": "true or false",
            "model_type": "keys and values, e.g. {kind: ...}" if where[0] != "readout" else "",
        }
        advice = f"give {wants.get(kind) or '{toward: [words], away: [words]}'}"
    also = f" (and {more} more)" if more else ""
    return refuse_at(path, located.line(where), found + also, advice)
