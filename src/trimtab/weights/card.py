"""What a baked checkpoint says of itself: a model card for readers, a record for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimtab.models.baked import read_record
from trimtab.results.tables import Table, clean
from trimtab.steering.units import convert
from trimtab.steering.weights import Scaled, WeightSteering
from trimtab.weights.plan import BakeReport, Plan

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


_PROVENANCE = ("behavior", "method", "data_hash", "split", "seed")


def model_card(plan: Plan, vectors: Sequence[Scaled], report: BakeReport) -> str:
    """Return the README.md of a baked checkpoint, Markdown with the hub's front matter."""
    checks = report.table()
    return "\n".join(
        (
            front_matter("transformers", plan.model),
            f"# {one_line(plan.model)}, steered\n",
            "The steering is part of this checkpoint's weights. It needs no hook and no extra"
            " library, acts on every token, and no prompt switches it off.\n",
            markdown(_origin(plan, report)),
            *(steering_section(vector) for vector in vectors),
            "## How it was done\n",
            "\n".join(f"{n}. {one_line(step)}" for n, step in enumerate(plan.steps, start=1))
            + "\n",
            "## Checked after saving and reloading\n",
            # Without the first rows: route and folder, the one said above, the other the maker's.
            markdown(Table("", checks.columns, checks.rows[2:])),
            _limits(plan),
            "## How to undo\n",
            _undo(plan),
        )
    )


def front_matter(library: str, base: str) -> str:
    """Return what the hub reads of a card: the library that loads it, tags, the base if it is there."""
    linked = f"base_model: {base}\n" if _HUB_ID.fullmatch(base) else ""
    return f"---\nlibrary_name: {library}\ntags:\n- trimtab\n- steering\n{linked}---"


def _origin(plan: Plan, report: BakeReport) -> Table:
    facts = {
        "base model": plan.model,
        "fingerprint of the base": report.base_fingerprint or "not recorded",
        "architecture": f"{plan.architecture} -> {plan.becomes}"
        if plan.becomes != plan.architecture
        else plan.architecture,
        "route": plan.route,
        "layers added": str(plan.extra_layers),
    }
    return Table("", ("what", "value"), tuple(facts.items()))


def steering_section(vector: Scaled) -> str:
    """Return what a card says of one lever: its origin, and a vector's strength in every unit."""
    made = vector.provenance
    facts = {
        "behavior": made.get("behavior", "not recorded"),
        "data hash": made.get("data_hash", "not recorded"),
        "method": made.get("method", "not recorded"),
        "layers (0-based)": ", ".join(map(str, vector.layers)),
        "operation, site, scope": f"{vector.operation}, {vector.site}, {vector.scope}",
        "strength m": f"{vector.strength:g}",
    }
    table = Table("", ("what", "value"), tuple((k, str(v)) for k, v in facts.items()))
    head = f"## Steering: {one_line(vector.label)}\n\n{markdown(table)}\n"
    if isinstance(vector, WeightSteering):
        return f"{head}Each of these matrices W becomes W + m B A, of rank {vector.rank}.\n"
    return (
        f"{head}alpha is the length added along a unit direction at each layer listed; share of norm is alpha"
        f" over the mean norm there on neutral prompts.\n\n{markdown(convert(vector).table())}"
    )


def _limits(plan: Plan) -> str:
    notes = "".join(f"\n- {one_line(note)}" for note in plan.notes)
    return (
        "## Limits\n\n- What the steering does to the behavior, and what else it changes, was not"
        " measured by the baking; measure it before use. `trimtab audit THIS BEHAVIOR --against"
        f" {one_line(plan.model)}` gives the margin before and after, beside a random control.{notes}\n"
    )


def _undo(plan: Plan) -> str:
    if not plan.changed:
        return "Nothing was changed: at strength 0 this is the base model.\n"
    new_biases = plan.new_tensors and all(name.endswith(".bias") for name in plan.changed)
    if new_biases and plan.becomes == plan.architecture and not plan.extra_layers:
        keys = ", ".join(f"`{name}`" for name in plan.steered)
        return (
            f"The steering is in the biases {keys}; every other new bias is zero and all other"
            " tensors are the base model's. Use the base model, or set those biases to zero.\n"
        )
    return (
        f"Use the base model: {len(plan.changed)} tensors here are new or changed"
        " (`changed_tensors` in `trimtab_bake.json` names them), and only the base holds what they"
        " were made from.\n"
    )


def markdown(table: Table) -> str:
    """Return a table as Markdown, its notes underneath."""
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    lines = ["| " + " | ".join(one_line(cell) for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def one_line(text: str) -> str:
    """Return text that cannot leave its line or its table cell."""
    return " ".join(clean(text).split()).replace("|", "\\|")


def record_of(
    plan: Plan, vectors: Sequence[Scaled], report: BakeReport, base: Path
) -> dict[str, Any]:
    """Return the record; that of a base which was baked itself is kept inside it."""
    facts = {k: v for k, v in report.to_dict().items() if k not in ("path", "plan")}
    return {
        "format": 1,
        "trimtab": version("trimtab"),
        "base_model": plan.model,
        "base_fingerprint": report.base_fingerprint,
        "base_architecture": plan.architecture,
        "steerings": [
            {
                "label": vector.label,
                "operation": vector.operation,
                "site": vector.site,
                "scope": str(vector.scope),
                "strength": vector.strength,
                "alphas": {str(k): v for k, v in vector.alphas.items()},
                "targets": {str(k): v for k, v in getattr(vector, "targets", {}).items()},
                **{fact: vector.provenance.get(fact) for fact in _PROVENANCE},
            }
            for vector in vectors
        ],
        "extra_layers": plan.extra_layers,
        "changed_tensors": list(plan.changed),
        "steps": list(plan.steps),
        "checked": facts,
        "earlier": read_record(base),
    }
