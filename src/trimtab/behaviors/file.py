"""Reads behavior files (docs/behaviors.md) and names file and line of whatever is wrong in one."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from trimtab.behaviors import BUILT_IN, built_in_names
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.jsonl import read_jsonl
from trimtab.behaviors.located import Located, read_text, refuse_at, refuse_in
from trimtab.behaviors.parts import BehaviorError
from trimtab.behaviors.split import SIDES
from trimtab.behaviors.yaml import read_yaml
from trimtab.errors import TrimtabError, nearest


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
    content = dict(located.content)
    for key in content:  # first: an unknown one is often the reason why another one is missing
        if key not in Behavior.model_fields:
            advice = nearest(key, list(Behavior.model_fields))
            raise refuse_at(path, located.line((key,)), f"unknown key {key!r}", advice)
    for side in SIDES:
        if side not in content:
            advice = "give both toward: and away:, each a list"
            raise refuse_at(path, located.line(()), f"no {side!r}", advice)
    if content.get("name") is None:
        content["name"] = path.stem
    try:
        return Behavior(**content)
    except BehaviorError as error:
        raise refuse_in(located, path, error) from error
