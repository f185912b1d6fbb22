"""JSONL behavior files: one example a line, and an optional first line about the behavior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.behaviors.located import Located, refuse_at
from trimtab.behaviors.parts import Location
from trimtab.behaviors.split import EXAMPLE_LISTS
from trimtab.errors import nearest

_KEYS = ("side", "prompt", "completion")


class _Repeated(ValueError):
    pass


def read_jsonl(text: str, path: Path) -> Located:
    r"""Read lines of `{"side": ..., "prompt": ..., "completion": ...}`, blank lines aside.

    The first line may be `{"behavior": {...}}` with the other keys of a behavior file.

    Raises:
        TrimtabError: malformed JSON, a repeated or unknown key, an unknown side.
    """
    content: dict[str, Any] = {}
    lines: dict[tuple[str, int], int] = {}
    head = 1
    started = False
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        item = _object(raw, path, number)
        if "behavior" in item and not started:
            if len(item) > 1 or not isinstance(item["behavior"], dict):
                advice = 'write {"behavior": {"name": ..., "judge": {...}}}'
                raise refuse_at(path, number, "a behavior line that is not one object", advice)
            for side in EXAMPLE_LISTS:
                if side in item["behavior"]:
                    advice = f'give each example a line of its own: {{"side": "{side}", ...}}'
                    raise refuse_at(path, number, f"{side!r} in the behavior line", advice)
            content.update(item["behavior"])
            head = number
        else:
            side = _side(item, path, number)
            listed = content.setdefault(side, [])
            lines[side, len(listed)] = number
            example = {key: value for key, value in item.items() if key != "side"}
            listed.append(example)
        started = True

    def line(location: Location) -> int:
        if len(location) > 1 and isinstance(location[1], int):
            return lines.get((str(location[0]), location[1]), head)
        return lines.get((str(location[0]), 0), head) if location else head

    return Located(content, line)


def _object(raw: str, path: Path, number: int) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise _Repeated(f"the key {key!r} for the second time")
            values[key] = value
        return values

    def constant(name: str) -> Any:
        raise _Repeated(f"the number {name}")

    try:
        item = json.loads(raw, object_pairs_hook=once, parse_constant=constant)
    except _Repeated as error:
        raise refuse_at(path, number, str(error), "keep plain JSON with each key once") from error
    except (json.JSONDecodeError, RecursionError) as error:
        found = f"no JSON: {error}"
        raise refuse_at(path, number, found, "write one JSON object a line") from error
    if not isinstance(item, dict):
        found = f"a {type(item).__name__} instead of an object"
        advice = 'write {"side": "toward", "prompt": "..."}'
        raise refuse_at(path, number, found, advice)
    return item


def _side(item: dict[str, Any], path: Path, number: int) -> str:
    if "behavior" in item:
        advice = "put it in the first line"
        raise refuse_at(path, number, "a behavior line after the examples", advice)
    for key in item:
        if key not in _KEYS:
            raise refuse_at(path, number, f"unknown key {key!r}", nearest(key, _KEYS))
    if "side" not in item:
        advice = f'give "side": one of {", ".join(EXAMPLE_LISTS)}'
        raise refuse_at(path, number, "an example without a side", advice)
    side = item["side"]
    if side not in EXAMPLE_LISTS:
        raise refuse_at(path, number, f"the side {side!r}", nearest(str(side), EXAMPLE_LISTS))
    return side
