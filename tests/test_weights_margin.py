"""Hardening: the readout margin before and after baking, with a null, in the card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap
from trimtab.models.load import load
from trimtab.weights import bake
from trimtab.weights.margin import measure_before


@pytest.fixture(scope="module")
def lm():
    return planted.language_model()


READOUT = {"toward": ["Z"], "away": ["Q"]}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_card_holds_the_margin_before_and_after(lm, tmp_path, sign):
    behavior = planted.behavior(10, readout=READOUT)
    vector = planted.push(lm, scope="all").at(sign)
    report = bake(lm, vector, tmp_path / "out", behavior=behavior)
    margin = report.margin
    assert margin is not None and margin.behavior == "opening"
    assert margin.data_hash == behavior.data_hash
    baked, held_out = load(str(tmp_path / "out")), behavior.split(0).test
    for row in margin.rows:
        prompts = [example.prompt for example in getattr(held_out, row.side)]
        assert row.n == len(prompts)
        assert row.before[0] == pytest.approx(float(gap(lm, behavior, prompts).mean()), abs=1e-4)
        assert row.after[0] == pytest.approx(float(gap(baked, behavior, prompts).mean()), abs=1e-4)
        assert row.change[0] * sign > 1.0 and abs(row.null) < abs(row.change[0])
        assert row.change[1] <= row.change[0] <= row.change[2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Margin of opening" in card and f"{margin.rows[0].after[0]:.2f}" in card
    assert behavior.data_hash in card and "change by a null" in card


def test_the_margin_says_whether_its_prompts_are_new_to_the_vector(lm):
    behavior = planted.behavior(10, readout=READOUT)
    vector = planted.push(lm, scope="all")

    def said(**made: object) -> bool | None:
        found = replace(vector, provenance={"data_hash": behavior.data_hash, "seed": 0, **made})
        return measure_before(lm, [found], behavior).held_out

    assert said(split="train") is True and said(split=None) is False
    assert said(split="train", data_hash="x") is None
    assert measure_before(lm, [vector], behavior).held_out is None


def test_a_behavior_without_readout_words_is_refused_and_nothing_is_left(lm, tmp_path):
    vector = planted.push(lm, scope="all")
    with pytest.raises(TrimtabError, match="readout"):
        bake(lm, vector, tmp_path / "out", behavior=planted.behavior(10))
    assert list(tmp_path.iterdir()) == []


def test_refusal_on_harbor_is_hardened(tmp_path):
    import trimtab as tt

    harbor = load("harbor", dtype=torch.float32)
    refusal = tt.behavior("refusal")
    vector = tt.find(harbor, refusal).select(scope="all").at(1.0)
    report = bake(harbor, vector, tmp_path / "out", behavior=refusal)
    assert report.margin is not None
    toward = report.margin.rows[0]
    assert report.margin.held_out is True
    assert "held-out prompts" in (tmp_path / "out" / "README.md").read_text()
    assert toward.side == "toward" and toward.change[1] > 0 and toward.change[0] > abs(toward.null)
