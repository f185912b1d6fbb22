"""The report: its parts agree with each other, its sentences with its numbers."""

from __future__ import annotations

import json

import pytest
import torch

import planted
import trimtab as tt
from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.geometry import STAGES, geometry
from trimtab.mechanism.geometry.propagator import SKIP_PATH
from trimtab.methods import find
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering


def behavior():
    words = [f"{a} {b}" for a in planted.WORDS for b in ("today", "now")]
    return planted.behavior(
        readout={"toward": ["Z"], "away": ["Q"]},
        toward=[f"Say something about the {w}." for w in words],
        away=[f"How do I find the {w}?" for w in words],
    )


def test_the_report_of_a_random_model(llama: LanguageModel) -> None:
    steps: list[tuple[int, int]] = []
    vector = VectorSteering.from_directions(llama, {1: torch.ones(llama.d_model)}, alpha=0.5)
    report = geometry(
        Case(llama, behavior(), vector), prompts=2, pairs=(8, 4), probes=2,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(k + 1, STAGES) for k in range(STAGES)]
    assert (report.measured.layer, report.measured.layer_from) == (1, "the vector's")
    assert report.functional.site == report.feasibility.rows[0].site == "resid_post.1"
    assert {row.site for row in report.ranks.rows} == {f"resid_post.{k}" for k in (0, 1, 2)}
    text = " ".join(report.findings)
    assert SKIP_PATH in text and "does not hold from resid_post.1" in text
    assert len(report.tables()) == 11
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["measured"]["behavior"] == "opening"


def test_a_vector_of_the_last_block_is_at_the_final_stream(llama: LanguageModel) -> None:
    vector = VectorSteering.from_directions(llama, {3: torch.ones(llama.d_model)})
    report = geometry(Case(llama, behavior(), vector), prompts=2, pairs=(5, 3), probes=1)
    assert "by definition" in report.findings[0]


def test_refusals(llama: LanguageModel) -> None:
    vector = VectorSteering.from_directions(llama, {1: torch.ones(llama.d_model)})
    with pytest.raises(TrimtabError, match="pairs"):
        geometry(Case(llama, behavior(), vector), pairs=(2, 2))
    with pytest.raises(TrimtabError, match="layer"):
        geometry(Case(llama, behavior(), vector), layer=9)
    with pytest.raises(TrimtabError, match="readout"):
        geometry(Case(llama, planted.behavior(), vector))


def test_the_built_in_model() -> None:
    lm = tt.load("harbor", dtype=torch.float32)
    mood = tt.behavior("mood")
    report = geometry(Case(lm, mood, find(lm, mood)), prompts=1, pairs=(8, 4), probes=1)
    one = next(x for x in report.propagator.layers if x.site == report.functional.site)
    assert one.same_frobenius.value > 0.2 and one.vector["same"].departure.mean > 0.5
    assert report.findings[0].startswith("J = I does not hold")
    assert report.functional.row("added", "differences").k <= 2
    assert report.functional.row("added", "random").k > 64
    for row in report.feasibility.rows:
        assert row.feasible and row.norm < 1.1 * row.alone < row.null / 2
        last = [p for p in row.pushed if p.direction == "program"][-1]
        assert last.train.share == 1.0 and last.test.share > 0.8
        assert next(p for p in row.pushed if p.direction == "random").test.share < 0.2
    assert report.linearity.edits.beyond.mean > 0.5
