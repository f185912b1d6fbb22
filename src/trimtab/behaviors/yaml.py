"""YAML for behavior files: plain data with line numbers, and no surprise about what is text.

Only `true`, `false`, `null` and numbers are read as such (YAML 1.2): the bare words yes, no, on and
off are text, and so are dates, because they are answers that models give.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from trimtab.behaviors.located import Located, refuse_at
from trimtab.behaviors.parts import Location
from trimtab.errors import TrimtabError

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_CORE_TAGS = ("str", "bool", "int", "float", "null", "timestamp", "value")


class _Composer(yaml.SafeLoader):
    """Composes nodes without aliases: a file of plain data has no need of them."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, "an alias (*name)", event.start_mark if event else None)
        return super().compose_node(parent, index)


def read_yaml(text: str, path: Path) -> Located:
    """Read one YAML document.

    Raises:
        TrimtabError: malformed YAML, a repeated key, an alias, a tag, or several documents.
    """
    loader: _Composer | None = None
    try:
        loader = _Composer(text)
        root = loader.get_single_node()
        content = None if root is None else _value(root, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = error.problem or error.context or "malformed YAML"
        advice = "mind the indentation, and put text with : or # or quotes in it in quotes"
        if "alias" in found:
            advice = "write the text out where it is used"
        elif "another document" in found:
            advice = "keep one behavior per file"
        raise refuse_at(path, mark.line + 1 if mark else 1, found, advice) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"the character {text[error.position]!r}, which YAML does not allow"
        raise refuse_at(path, line, found, "remove it, or write it as an escape") from error
    except RecursionError as error:
        raise refuse_at(path, 1, "lists nested too deeply", "keep it flat") from error
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        raise refuse_at(path, 1, "no content", "see docs/behaviors.md for a file to copy")
    return Located(content, lambda location: _line(root, location))


def _value(node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(item, path) for item in node.value]
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise _tagged(node, path)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise refuse_at(path, line, "a key that is not a word", "write `key: value`")
        if key in values:
            advice = "keep one of them"
            raise refuse_at(path, line, f"the key {key!r} for the second time", advice)
        values[key] = _value(value_node, path)
    return values


def _scalar(node: yaml.ScalarNode, path: Path) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in _CORE_TAGS:
        raise _tagged(node, path)
    text = str(node.value)
    if node.style is not None:  # quoted or a block: text, whatever it looks like
        return text
    if text.lower() in _WORDS and text in (text.lower(), text.title(), text.upper()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text) and len(text) < 100:
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _tagged(node: yaml.Node, path: Path) -> TrimtabError:
    line = node.start_mark.line + 1
    return refuse_at(path, line, f"the tag {node.tag!r}", "use plain text, lists and keys only")


def _line(root: yaml.Node, location: Location) -> int:
    """Follow a location as far as it exists; a key that is not there has the line of its parent."""
    node, line = root, root.start_mark.line
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        else:
            break
    return line + 1
