"""`tt.explain`, its page and its command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import planted
import trimtab as tt
from trimtab.behaviors.behavior import Readout
from trimtab.cli.app import app
from trimtab.errors import TrimtabError
from trimtab.mechanism import Explanation
from trimtab.mechanism.circuits.attribution import AttributionSummary, NodeScore
from trimtab.mechanism.conclusions import conclusions
from trimtab.mechanism.working import LEAST_GAIN, NEARLY, working_strength
from trimtab.models.model import LanguageModel
from trimtab.report.explain_page import explain_sections, write_explain_page
from trimtab.steering.vector import VectorSteering


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def contrast() -> tt.Behavior:
    return planted.behavior(10, readout=Readout(toward=("Z",), away=("Q",)))


@pytest.fixture(scope="module")
def vector(lm: LanguageModel) -> VectorSteering:
    """Toward Z at the second layer: what follows can still change it."""
    rows = lm.model.get_parameter("lm_head.weight").detach()
    z, q = (lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "ZQ")
    return VectorSteering.from_directions(lm, {1: rows[z] - rows[q]}, alpha=12.0)


@pytest.fixture(scope="module")
def found(lm: LanguageModel, contrast: tt.Behavior, vector: VectorSteering) -> Explanation:
    return tt.explain(lm, contrast, vector, look=False, max_prompts=3, max_new_tokens=4)


def test_every_part_is_there_and_plain(found: Explanation) -> None:
    plain = json.loads(json.dumps(found.to_dict()))
    parts = {"explained", "findings", "working", "attribution", "random_edges", "circuit"}
    assert parts | {"frozen", "values", "sparsity", "geometry"} == set(plain)
    assert found.attribution.completeness == pytest.approx(1, abs=0.05)
    assert found.circuit.chosen.value >= found.circuit.threshold
    assert {one.part for one in found.findings} >= {
        "where",
        "circuit",
        "what it says",
        "how many directions",
    }
    assert all(one.said and one.choice for one in found.findings)


@pytest.fixture(scope="module")
def away(vector: VectorSteering) -> VectorSteering:
    """Away from Z, which no unsteered answer shows, over the prompt alone: answers stay varied."""
    return vector.select(scope="prompt", strength=-4.0)


def test_a_strength_that_moves_nothing_is_replaced_by_the_weakest_that_works(
    lm: LanguageModel, contrast: tt.Behavior, away: VectorSteering
) -> None:
    split = contrast.split(0).validation
    limits: dict[str, Any] = {"max_prompts": 3, "max_new_tokens": 4}
    good = working_strength(lm, split, away, **limits)
    assert good.moves and good.used == good.given and len(good.tried) == 1
    found = working_strength(lm, split, away.at(-0.25), **limits)
    assert not found.tried[0].score and found.moves and found.used < -0.25
    best = max(one.score for one in found.tried)
    weaker = [one.score for one in found.tried if abs(one.strength) < abs(found.used)]
    assert all(score < NEARLY * best for score in weaker)
    own = working_strength(lm, split, away.at(-0.25), look=False, **limits)
    assert len(own.tried) == 1 and own.used == -0.25


def test_where_no_strength_moves_anything_the_own_one_is_explained(
    lm: LanguageModel, contrast: tt.Behavior, away: VectorSteering
) -> None:
    """Over all tokens every answer ends in one letter, which is no answer."""
    everywhere = away.select(scope="all")
    split = contrast.split(0).validation
    found = working_strength(lm, split, everywhere, max_prompts=3, max_new_tokens=4)
    assert len(found.tried) > 1 and not found.moves and found.used == found.given


def test_the_page_names_the_strength_that_is_explained(
    lm: LanguageModel, contrast: tt.Behavior, away: VectorSteering, found: Explanation
) -> None:
    raised = tt.explain(lm, contrast, away.at(-0.25), max_prompts=3, max_new_tokens=4)
    assert -8 <= raised.working.used < -0.25
    assert f"m={raised.working.used:+g}" in raised.explained.vector
    first = raised.findings[0]
    assert first.part == "strength" and "-0.25" in first.said and "tune" in first.choice
    frozen = raised.frozen
    gained = frozen.row("steered", -1).score.value - frozen.row("unsteered", -1).score.value
    assert gained >= 100 * LEAST_GAIN
    still = found.findings[0]
    assert still.part == "strength" and "does not move" in still.choice
    assert not found.working.moves


def test_both_directions_are_read_when_asked(
    lm: LanguageModel, contrast: tt.Behavior, vector: VectorSteering
) -> None:
    both = tt.explain(lm, contrast, vector, both=True, look=False, max_prompts=2, max_new_tokens=3)
    assert both.explained.signs == (1, -1)
    assert set(both.frozen.prompts) == {1, -1}


def test_conclusions_follow_the_figures(found: Explanation) -> None:
    """Other figures, other sentences."""

    def said(edges: AttributionSummary, **other: object) -> dict[str, tuple[str, str]]:
        parts = {
            "circuit": found.circuit,
            "frozen": found.frozen,
            "values": found.values,
            "sparsity": found.sparsity,
            "shape": found.geometry,
            **other,
        }
        listed = conclusions((1,), found.working, edges, None, **parts)  # pyright: ignore[reportArgumentType]
        return {one.part: (one.said, one.choice) for one in listed}

    moved = replace(found.attribution, nodes=(NodeScore("mlp", 3, None, 9.0),))
    assert "the MLP of layer 3 (100 %)" in said(moved)["where"][0]
    weak = replace(found.circuit, held_out=replace(found.circuit.held_out, value=0.1))
    assert "do not build on it" in said(found.attribution, circuit=weak)["circuit"][1]
    assert "network's own" not in said(found.attribution)["circuit"][1]
    dull = replace(found.values, total=replace(found.values.total, p=0.6))
    assert "do not label" in said(found.attribution, values=dull)["what it says"][1]
    clear = replace(found.values, total=replace(found.values.total, p=0.01))
    assert "may be used to label" in said(found.attribution, values=clear)["what it says"][1]


def test_the_page_opens_offline_and_escapes(found: Explanation, tmp_path: Path) -> None:
    hostile = replace(found, explained=replace(found.explained, model="<script>alert(1)</script>"))
    page = write_explain_page(tmp_path, hostile).read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert len(explain_sections(found)) == 7
    assert "Where it acts" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_what_cannot_be_explained_is_refused(
    lm: LanguageModel, contrast: tt.Behavior, vector: VectorSteering
) -> None:
    with pytest.raises(TrimtabError, match="strength 0"):
        tt.explain(lm, contrast, vector.at(0))
    with pytest.raises(TrimtabError, match="ablate"):
        tt.explain(lm, contrast, vector.select(operation="ablate"))
    with pytest.raises(TrimtabError, match="no greedy token"):
        tt.explain(lm, contrast, vector.at(1e-6), max_prompts=2, max_new_tokens=2)


def test_the_command_refuses_a_file_that_is_no_vector(tmp_path: Path) -> None:
    wrong = tmp_path / "v.safetensors"
    wrong.write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["explain", "harbor", "refusal", str(wrong)])
    assert result.exit_code == 2 or isinstance(result.exception, TrimtabError)


def test_the_command_writes_json_and_page(
    lm: LanguageModel,
    contrast: tt.Behavior,
    vector: VectorSteering,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = vector.save(tmp_path / "v.safetensors"), tmp_path / "why.json"
    monkeypatch.setattr("trimtab.cli.explain.load_model", lambda *a, **k: lm)
    module = sys.modules["trimtab.behaviors.behavior"]  # `trimtab.behaviors.behavior` is the function
    monkeypatch.setattr(module, "load_behavior", lambda name: contrast)
    command = ["explain", "tiny", "opening", str(file), "--json", str(out)]
    command += ["--report", str(tmp_path / "why"), "--max-prompts", "2", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["explained"]["behavior"] == "opening"
    assert (tmp_path / "why" / "index.html").exists()
