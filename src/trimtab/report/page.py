"""The report: one folder that opens offline, `index.html` and the Plotly bundle it draws with.

Text from models and users is escaped by jinja2's autoescape; figures travel as JSON in which `<` is
escaped. The data is the dict that `trimtab.demo.run_demo` writes as `demo.json`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trimtab.errors import TrimtabError
from trimtab.report import figures
from trimtab.report.figures import Row
from trimtab.report.words import answer, warnings
from trimtab.results.files import written
from trimtab.results.tables import ABSENT, clean, number, percent, to_plain


def write_report(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write `index.html` and `plotly.min.js` into a folder and return the page's path.

    Args:
        folder: made when missing; other files in it are left alone.
        data: `{"model": name, "behaviors": {name: entry}}` and whatever else `demo.json` holds.

    Raises:
        TrimtabError: when the data names no behavior or the folder cannot be written.
    """
    behaviors = data.get("behaviors")
    if not isinstance(behaviors, Mapping) or not behaviors:
        raise TrimtabError(
            asked="a report",
            found="data without an entry under 'behaviors'",
            advice="give {'model': ..., 'behaviors': {name: figures}}, as demo.json holds",
        )
    return write_page(folder, render(data))


def write_page(folder: str | os.PathLike[str], page: str) -> Path:
    """Write a rendered page as `index.html`, the Plotly bundle beside it, and return its path.

    Raises:
        TrimtabError: when the folder cannot be written.
    """
    target = Path(folder)
    write_text(target / "plotly.min.js", _plotly_bundle())
    return write_text(target / "index.html", page)


def render(data: Mapping[str, Any]) -> str:
    """Render the page's HTML from the data, without writing anything."""
    plain = to_plain(data)
    assert isinstance(plain, dict)
    sections = [_section(name, entry) for name, entry in plain["behaviors"].items()]
    template = environment().get_template("index.html.j2")
    return template.render(model=plain.get("model", "?"), sections=sections, facts=_facts(plain))


def write_text(path: Path, text: str) -> Path:
    """Write a text file; no reader sees half of it."""
    with written(path) as file:
        file.write_text(text, encoding="utf-8")
    return path


def _section(name: str, entry: Row) -> dict[str, Any]:
    levers = figures.levers_of(entry)
    return {
        "name": name,
        "id": "behavior-" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-"),
        "entry": entry,
        "answer": answer(name, entry),
        "warnings": warnings(name, entry),
        "levers": [(lever, figures.LABELS[lever], row) for lever, row in levers],
        "bars": figures.lever_bars(name, entry) if levers else None,
        "curve": figures.strength_curve(name, entry) if entry.get("curve") else None,
        "rows": figures.curve_rows(entry),
        "facts": _behavior_facts(entry),
    }


def _facts(data: Row) -> list[tuple[str, str]]:
    versions = data.get("versions") or {}
    return _known(
        ("model", data.get("model")),
        ("fingerprint", data.get("fingerprint")),
        ("command", data.get("command")),
        ("seed", data.get("seed")),
        ("time", f"{data['seconds']:.0f} s" if data.get("seconds") is not None else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    )


def _behavior_facts(entry: Row) -> list[tuple[str, str]]:
    match = entry.get("baked_matches_hook") or {}
    alpha = entry.get("alpha")
    per_layer = alpha.items() if isinstance(alpha, Mapping) else ()
    return _known(
        ("method", entry.get("method")),
        ("layers", ", ".join(str(layer) for layer in entry.get("layers") or ()) or None),
        ("scope", entry.get("scope")),
        ("strength m", entry.get("strength")),
        ("raw alpha", ", ".join(f"layer {k}: {number(v, 3)}" for k, v in per_layer) or None),
        ("data hash", entry.get("data_hash")),
        ("prompts", _sizes(entry.get("sizes"))),
        ("seed", entry.get("seed")),
        ("baked folder", match.get("path")),
        ("baked - hook", _agreement(match)),
    )


def _agreement(match: Row) -> str | None:
    if match.get("max_logit_difference") is None:
        return None
    text = "same text" if match.get("equal_text") else "text differs"
    return f"largest logit difference {match['max_logit_difference']:.1e}, {text}"


def _sizes(sizes: Row | None) -> str | None:
    return ", ".join(f"{split} {count}" for split, count in sizes.items()) if sizes else None


def _known(*facts: tuple[str, object]) -> list[tuple[str, str]]:
    return [(label, _figure(value)) for label, value in facts if value is not None]


def _figure(value: object) -> str:
    if isinstance(value, float):
        return number(value, 3)
    return ABSENT if value is None else clean(str(value))


def _share(value: object) -> str:
    return percent(value) if isinstance(value, int | float) else ABSENT


def _nats(value: object) -> str:
    return number(value) if isinstance(value, int | float) else ABSENT


def _conversation(prompt: object) -> str:
    """Write a prompt as text: itself, or one line a message, `role: content`."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)


@cache
def environment() -> Environment:
    """Return the templates' environment: everything is escaped, figures have filters."""
    templates = Environment(
        loader=PackageLoader("trimtab.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "share": _share,
        "nats": _nats,
        "figure": _figure,
        "conversation": _conversation,
    }
    return templates


def _plotly_bundle() -> str:
    from plotly.offline import get_plotlyjs  # four megabytes, read only when a report is written

    return get_plotlyjs()
