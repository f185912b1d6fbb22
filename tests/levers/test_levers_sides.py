"""The levers table on the other side, and on a model where some levers cannot be made."""

from __future__ import annotations

from typing import Any

import planted
import tiny
from trimtab.levers.found import Effort
from trimtab.levers.table import compare_levers
from trimtab.models.model import LanguageModel
from trimtab.report.levers_section import levers_section
from trimtab.steering.prompt import prompt

BUDGET = 0.6
WORDS = {"toward": ["Z"], "away": ["Q"]}
QUICK = Effort(methods=(), prompt_tokens=1, search_requests=1, soft_steps=1, lora_steps=1)
SMALL: dict[str, Any] = {"max_prompts": 2, "max_new_tokens": 4, "nulls": 1, "rounds": 1}


def test_the_other_side_and_a_given_prompt(llama: LanguageModel) -> None:
    vector = planted.push(llama, scope="all")
    behavior = planted.behavior(10, readout=WORDS, prompt_toward="Say Z.", prompt_away="Say Q.")
    made = compare_levers(
        llama, behavior, budget=BUDGET, direction="away", vector=vector, prompt=prompt("Say Q.", "prefix"),
        effort=QUICK, **SMALL,
    )  # fmt: skip
    row = made.row("vector (all)")
    base = made.row("unsteered").gap
    assert row.strength is not None and row.strength < 0
    assert row.gap is not None and base is not None and row.gap < base - 0.5
    assert made.row("prompt").lever == 'prefix "Say Q."' and made.row("prompt").calls == 0
    assert "away" in made.table().title


def test_what_cannot_be_made_is_named() -> None:
    lm = tiny.language_model("gemma2")
    bare = planted.behavior(10, readout=WORDS)
    vector = planted.push(lm, scope="all")
    made = compare_levers(lm, bare, budget=BUDGET, vector=vector, effort=QUICK, **SMALL)
    assert "Gemma2ForCausalLM" in made.missing["rank-1"]
    assert "instruction prompt" in made.missing["plain prompt"]
    assert "no answers" in made.missing["LoRA"] and "no answers" in made.missing["soft prompt"]
    assert made.row("bias").bakeable == "exact: null block"
    assert "normalizes" in made.row("ablation").bakeable
    assert any("rank-1" in warning for warning in levers_section(made).warnings)
