"""The model card of a baked checkpoint: what it is, how hard it steers, how to undo it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trimtab.model import LanguageModel
from trimtab.steering import VectorSteering
from trimtab.strength.units import convert
from trimtab.tables import Table, clean

if TYPE_CHECKING:
    from trimtab.weights.bake import BakeReport

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(lm: LanguageModel, vector: VectorSteering, report: BakeReport) -> str:
    """Return the README.md of a baked checkpoint, Markdown with the hub's front matter."""
    base = lm.name or "a model without a name"
    origin = {
        "base model": base,
        "fingerprint of the base": lm.fingerprint,
        "behaviour": vector.provenance.get("behavior", "not recorded"),
        "data hash": vector.provenance.get("data_hash", "not recorded"),
        "method": vector.provenance.get("method", "not recorded"),
        "layers (0-based)": ", ".join(map(str, vector.layers)),
        "operation, site, scope": f"{vector.operation}, {vector.site}, {vector.scope}",
        "strength m": f"{vector.strength:g}",
    }
    facts = Table("", ("what", "value"), tuple((k, str(v)) for k, v in origin.items()))
    checks = report.table()
    linked = f"base_model: {base}\n" if HUB_ID.fullmatch(base) else ""
    return "\n".join(
        (
            f"---\nlibrary_name: transformers\ntags:\n- trimtab\n- steering\n{linked}---",
            f"# {_cell(base)}, steered\n",
            "A constant is added to the residual stream by biases of this checkpoint. It needs no"
            " hook and no extra library, acts on every token, and no prompt switches it off.\n",
            _markdown(facts),
            "## Strength\n\nalpha is added along a unit direction to the output of each layer"
            " listed; mu is the mean norm of that output on neutral prompts.\n",
            _markdown(convert(vector).table()),
            "## Checked after saving and reloading\n",
            _markdown(Table("", checks.columns, checks.rows[2:])),  # the folder is the maker's own
            "## Limits\n\nWhat the steering does to the behaviour, and what else it changes, was"
            " not measured by the baking; measure it against the base model before use.\n",
            "## How to undo\n",
            _undo(lm, vector),
        )
    )


def _undo(lm: LanguageModel, vector: VectorSteering) -> str:
    keys = ", ".join(f"`model.layers.{layer}.mlp.down_proj.bias`" for layer in vector.layers)
    if lm.model.config.mlp_bias:
        return (
            f"The steering was added to the biases {keys}. The base model has biases of its own"
            " there: copy these tensors from it.\n"
        )
    return (
        f"The steering is in the biases {keys}; every other MLP bias is zero and all other tensors"
        " are the base model's. Use the base model, or set those biases to zero.\n"
    )


def _markdown(table: Table) -> str:
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def _cell(text: str) -> str:
    return " ".join(clean(text).split()).replace("|", "\\|")
