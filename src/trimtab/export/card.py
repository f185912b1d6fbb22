"""The card of an exported adapter: what it does, how hard, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.export.files import public_name
from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering
from trimtab.strength.units import convert
from trimtab.tables import Table, clean
from trimtab.weights.card import HUB_ID

_LOAD = """## How to load
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")
```
`with model.disable_adapter():` is the base model, unsteered.
"""


def adapter_card(
    lm: LanguageModel, vectors: Sequence[VectorSteering], modules: Sequence[str], has_bias: bool
) -> str:
    """Return the README.md of a PEFT folder, Markdown with the hub's front matter."""
    base = public_name(lm.name or "a model without a name")
    linked = f"base_model: {base}\n" if HUB_ID.fullmatch(base) else ""
    limits = (
        "- It acts on every token, and no prompt switches it off.\n"
        "- What it does to the behaviour, and what else it changes, was not measured by the"
        " export.\n"
    )
    if has_bias:
        limits += (
            "- It has biases: a base model without them cannot merge it (`trimtab bake` can).\n"
        )
    return "\n".join(
        (
            f"---\nlibrary_name: peft\ntags:\n- trimtab\n- steering\n{linked}---",
            f"# {_line(base)}, a steering adapter\n",
            f"Fingerprint of the base: {lm.fingerprint}. Modules: {', '.join(modules)}.\n",
            *(_steering(vector) for vector in vectors),
            _LOAD,
            f"## Limits\n\n{limits}",
        )
    )


def _steering(vector: VectorSteering) -> str:
    made = vector.provenance
    facts = (
        ("behaviour", made.get("behavior", "not recorded")),
        ("data hash", made.get("data_hash", "not recorded")),
        ("method", made.get("method", "not recorded")),
        ("layers (0-based)", ", ".join(map(str, vector.layers))),
        ("operation, site, scope", f"{vector.operation}, {vector.site}, {vector.scope}"),
        ("strength m", f"{vector.strength:g}"),
    )
    table = Table("", ("what", "value"), tuple((name, str(value)) for name, value in facts))
    return (
        f"## Steering: {_line(vector.label)}\n\n{_markdown(table)}\n"
        "alpha is the length added along a unit direction; mu is the mean norm there on neutral"
        f" prompts.\n\n{_markdown(convert(vector).table())}"
    )


def _markdown(table: Table) -> str:
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    lines = ["| " + " | ".join(_line(cell) for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def _line(text: str) -> str:
    return " ".join(clean(text).split()).replace("|", "\\|")
