"""The matrix architecture x operation x scope: exact after a real save and reload, or refused.

`TRIMTAB_WRITE_MATRIX=1` writes docs/bake-matrix.md; otherwise the page is compared with what holds.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import at_every_writer, bake, plan
from trimtab.weights.disk.base import save_model

PAGE = Path(__file__).parents[2] / "docs" / "bake-matrix.md"
OPERATIONS = ("add", "ablate", "affine")
SCOPES = ("all", "last", "generated")
PROMPTS = ["The ferry leaves the harbor at noon.", "How do I borrow the ledger?"]
EXACT = 1e-5
# What the second table of the page shows, beside `add` at resid_post, in the first.
ELSEWHERE = {
    "add at embed": {"site": "embed", "layers": (0,)},
    "add at resid_mid": {"site": "resid_mid"},
    "add at attn_out": {"site": "attn_out"},
    "add at mlp_out": {"site": "mlp_out"},
    "ablate at embed": {"site": "embed", "layers": (0,), "operation": "ablate"},
    "ablate at resid_post alone": {"operation": "ablate"},
}
HEADER = """\
# Which steerings a checkpoint can hold

Written by `tests/weights/test_weights_matrix.py`: every exact cell was baked into a tiny random model of
the architecture, saved, loaded again by stock transformers and compared with the hook, in float32,
over every logit of two prompts. "add" is at `resid_post` of all four layers at once; "ablate" and
"affine" are one direction at every writer of the stream (`at_every_writer`: embed, attn_out and
mlp_out of every layer). The Mistral of these tests has a sliding window; without one it becomes a
Llama with a bias.

"""


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def steerings(lm: LanguageModel, operation: str, scope: str) -> list[VectorSteering]:
    if operation == "add":
        each = {layer: direction(layer) for layer in range(tiny.LAYERS)}
        return [VectorSteering.from_directions(lm, each, 0.6, scope=scope)]
    targets = {1: 0.7} if operation == "affine" else None
    one = VectorSteering.from_directions(
        lm, {1: direction(1)}, scope=scope, operation=operation, targets=targets
    )
    return list(at_every_writer(one))


def elsewhere(lm: LanguageModel, site="resid_post", layers=(1, 2), operation="add"):
    each = {layer: direction(layer) for layer in layers}
    return [VectorSteering.from_directions(lm, each, 0.6, site=site, operation=operation)]


def logits(model) -> torch.Tensor:
    inner = model.model if isinstance(model, LanguageModel) else model
    with torch.no_grad():
        return torch.cat([inner(torch.tensor([ids])).logits[0] for ids in IDS])


IDS = [tiny.tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]


def cell(lm: LanguageModel, base: Path, vectors: list[VectorSteering], out: Path) -> str:
    try:
        report = bake(base, vectors, out, verify=False)
    except TrimtabError as error:
        assert not out.exists()
        return f"refused: {error.found.removeprefix('no exact route: ')}"
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    baked, info = loaded
    assert not any(info.values()), info
    plain = logits(lm)
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(lm))
        hooked = logits(lm)
    assert (hooked - plain).abs().max() > 0.05  # there was something to lose
    difference = float((logits(baked.eval()) - hooked).abs().max())
    assert difference <= EXACT, (report.route, difference)
    return f"exact by {report.route}, {difference:.0e}"


def section(name: str, cells: dict[tuple[str, str], str]) -> str:
    lines = ["| | " + " | ".join(f"scope {s}" for s in SCOPES) + " |", "|---|---|---|---|"]
    for operation in OPERATIONS:
        row = [cells[operation, scope] for scope in SCOPES]
        lines.append(f"| {operation} | " + " | ".join(row) + " |")
    lines += ["", "| scope all, layers 1-2 | |", "|---|---|"]
    lines += [f"| {what} | {cells[what, 'all']} |" for what in ELSEWHERE]
    return f"## {name}\n\n" + "\n".join(lines) + "\n"


SECTIONS: dict[str, str] = {}


def without_figures(text: str) -> str:
    return re.sub(r", \d(\.\d)?e[+-]\d+", "", text)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_cell_is_exact_or_refused(name, tmp_path):
    lm = tiny.language_model(name)
    base = tmp_path / "base"
    save_model(lm, base)
    cells = {
        (operation, scope): cell(
            lm, base, steerings(lm, operation, scope), tmp_path / f"{operation}-{scope}"
        )
        for operation in OPERATIONS
        for scope in SCOPES
    }
    for number, (what, how) in enumerate(ELSEWHERE.items()):
        try:
            cells[what, "all"] = cell(lm, base, elsewhere(lm, **how), tmp_path / f"other{number}")
        except TrimtabError as error:  # a site that the hook does not have either
            cells[what, "all"] = f"refused: {error.found}"
    assert cells["add", "all"].startswith("exact by ")
    assert all(cells[o, s].startswith("refused: ") for o in OPERATIONS for s in SCOPES[1:])
    for layer in range(tiny.LAYERS):
        found = plan(base, VectorSteering.from_directions(lm, {layer: direction(layer)}))
        assert found.exact and found.rows[0].layers == (layer,)
    if name not in ("gemma2", "gemma3", "olmo2"):
        assert cells["ablate", "all"].startswith("exact") and cells["affine", "all"][:5] == "exact"
    SECTIONS[name] = section(type(lm.model).__name__, cells)
    if not os.environ.get("TRIMTAB_WRITE_MATRIX"):
        written = without_figures(PAGE.read_text(encoding="utf-8"))
        assert without_figures(SECTIONS[name]) in written


def test_the_page_holds_every_architecture():
    if os.environ.get("TRIMTAB_WRITE_MATRIX"):
        assert set(SECTIONS) == set(tiny.ARCHITECTURES)
        PAGE.write_text(HEADER + "\n".join(SECTIONS[n] for n in tiny.ARCHITECTURES), "utf-8")
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("\n## ") == len(tiny.ARCHITECTURES)
    assert all(float(f) <= EXACT for f in re.findall(r", (\de-\d+) \|", page))
