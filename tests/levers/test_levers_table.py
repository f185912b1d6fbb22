"""The levers table on a planted behavior: every row, its budget, its page and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator
from trimtab.levers.entries import NAMES
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.settle import Bench, settle_vector
from trimtab.levers.table import LeversTable, compare_levers
from trimtab.models.model import LanguageModel
from trimtab.report.levers_section import levers_section
from trimtab.report.page import render
from trimtab.steering.prompt import prompt

BUDGET = 0.6
QUICK = Effort(
    methods=("mean_difference",),
    prompt_tokens=2,
    search_requests=2,
    soft_steps=2,
    repair_steps=1,
    lora_rank=1,
    lora_steps=2,
)
SMALL: dict[str, Any] = {"max_prompts": 3, "max_new_tokens": 4, "nulls": 2, "rounds": 1}


@pytest.fixture(scope="module")
def behavior():
    return planted.behavior(
        10, readout={"toward": ["Z"], "away": ["Q"]}, prompt_toward="Say Z.", prompt_away="Say Q."
    )


@pytest.fixture(scope="module")
def found(llama: LanguageModel, behavior) -> FoundLevers:
    vector = planted.push(llama, scope="all")
    return find_levers(llama, behavior, vector=vector, effort=QUICK)


@pytest.fixture(scope="module")
def table(llama: LanguageModel, behavior, found: FoundLevers) -> LeversTable:
    before = {k: v.clone() for k, v in llama.model.state_dict().items()}
    steps: list[tuple[int, int]] = []
    made = compare_levers(
        llama, behavior, budget=BUDGET, found=found, progress=lambda n, of: steps.append((n, of)),
        **SMALL,
    )  # fmt: skip
    assert steps[-1][0] == steps[-1][1] and [n for n, _ in steps] == sorted(n for n, _ in steps)
    assert all(torch.equal(before[k], v) for k, v in llama.model.state_dict().items())
    return made


def test_every_row_is_there_in_order(table: LeversTable) -> None:
    assert [row.name for row in table.rows] == ["unsteered", *NAMES]
    assert table.missing == {}
    assert table.row("unsteered").damage == 0 and table.row("unsteered").gain == 0
    with pytest.raises(TrimtabError, match="no such|'unsteered'"):
        table.row("magic")


def test_strengths_keep_the_budget_on_validation(table: LeversTable) -> None:
    for name in ("vector (all)", "vector (last)", "bias", "rank-1", "LoRA", "ablation"):
        row = table.row(name)
        assert row.within and row.validation.damage_p95 <= BUDGET * 1.02, name
        assert row.strength
        if row.limited_by == "budget":
            assert row.validation.damage_p95 > 0.5 * BUDGET, name
    assert table.row("plain prompt").strength is None
    assert table.row("plain prompt").limited_by == "as found"


def test_what_is_one_thing_measures_as_one(table: LeversTable) -> None:
    """The bias is the vector, in a checkpoint that was written and read again."""
    vector, bias = table.row("vector (all)"), table.row("bias")
    assert bias.scores == vector.scores
    assert bias.damage == pytest.approx(vector.damage, abs=1e-4)
    assert bias.perplexity == pytest.approx(vector.perplexity, rel=1e-3)
    assert bias.residual is not None and bias.residual < 1e-3
    assert vector.baked and bias.baked and not table.row("vector (last)").baked
    assert table.row("random").strength == vector.strength


def test_the_vector_that_was_planted_works(table: LeversTable) -> None:
    vector, base, null = (table.row(n) for n in ("vector (all)", "unsteered", "random"))
    assert vector.gap is not None and base.gap is not None and null.gap is not None
    assert vector.gap > base.gap + 0.5
    assert vector.gap > null.gap + 0.5


def test_context_and_calls(llama: LanguageModel, table: LeversTable) -> None:
    assert table.row("soft prompt").context_tokens >= 2
    assert table.row("vector (all)").context_tokens == 0 == table.row("LoRA").context_tokens
    request = "How do I find the cats?"
    with prompt("Say Z.").on(llama):
        longer = len(llama.encode(request).ids)
    extra = longer - len(llama.encode(request).ids)
    assert table.row("plain prompt").context_tokens == extra
    assert table.row("plain prompt").calls == 0
    assert table.row("prompt").calls > table.row("soft prompt").calls > 0
    assert table.row("rank-1").calls > table.row("vector (all)").calls == table.row("bias").calls


def test_json_page_and_advice(table: LeversTable, tmp_path: Path) -> None:
    saved = json.loads(table.save(tmp_path / "levers.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["unsteered", *NAMES]
    assert saved["advice"]["sentence"].startswith("opening, 0.6 nats: use")
    text = str(table)
    assert table.advice.sentence[:30] in " ".join(text.split())
    section = levers_section(table)
    assert section.paragraphs[0] == table.advice.sentence
    drawn = section.figures[0]["data"][0]["x"]
    assert drawn == pytest.approx([row.score for row in table.rows])
    html = render([section], title="Which lever")
    assert "vector (all)" in html and "what each lever is" in html


def test_levers_of_another_behavior_and_budgets_are_refused(
    llama: LanguageModel, behavior, found: FoundLevers
) -> None:
    with pytest.raises(TrimtabError, match="levers found for"):
        compare_levers(llama, behavior, direction="away", found=found)
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(TrimtabError, match="above 0"):
            compare_levers(llama, behavior, budget=budget, found=found)


def test_settling_takes_the_place_that_works(llama: LanguageModel, behavior) -> None:
    """Only the last layer holds the planted direction, the others are random."""
    vector = planted.push(llama, scope="all", layers=(0, 1, 2, 3))
    validation = Evaluator(llama, behavior, max_new_tokens=4, max_prompts=4)
    chosen, placed = settle_vector(Bench(llama, validation, BUDGET, 1), (vector,), "all")
    assert chosen.layers == (3,) and chosen.strength == placed.strength > 0
