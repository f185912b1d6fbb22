"""`tt.explain`, its page and its command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import planted
import trimtab as tt
from trimtab.behaviors.behavior import Readout
from trimtab.cli.app import app
from trimtab.cli.screen import COLUMNS, LINES, show
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import Judge, register_judge
from trimtab.mechanism import Case, Explanation
from trimtab.mechanism.circuits.attribution import AttributionSummary, NodeScore
from trimtab.mechanism.conclusions import conclusions
from trimtab.mechanism.working import LEAST_GAIN, NEARLY, working_strength
from trimtab.models import generation
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.report.explain_page import explain_sections, write_explain_page
from trimtab.steering.vector import VectorSteering

BUILT: Counter[str] = Counter()


@register_judge("test-counted")
def counted(behavior: tt.Behavior, options: Mapping[str, object]) -> Judge:
    BUILT[behavior.name] += 1
    return planted.opens(behavior, options)


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
    return tt.explain(lm, contrast, vector, strength=vector.strength, max_prompts=3, max_new_tokens=4)


def test_every_part_is_there_and_plain(found: Explanation) -> None:
    plain = json.loads(json.dumps(found.to_dict()))
    parts = {"explained", "findings", "working", "attribution", "random_edges", "circuit"}
    assert parts | {"frozen", "values", "sparsity", "geometry", "exchanged"} == set(plain)
    assert plain["exchanged"] is None
    assert found.attribution.completeness == pytest.approx(1, abs=0.05)
    assert found.circuit.chosen.value >= found.circuit.threshold
    assert {one.part for one in found.findings} >= {
        "where",
        "circuit",
        "what it says",
        "how many directions",
    }
    assert all(one.said and one.choice for one in found.findings)


def test_what_the_parts_share_is_prepared_once(
    lm: LanguageModel, vector: VectorSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One split, one judge, and one unsteered answer to each test prompt."""
    contrast = planted.behavior(
        10, readout=Readout(toward=("Z",), away=("Q",)), judge="test-counted", name="counted"
    )
    test = contrast.split(0).test
    plain: dict[tuple[int, ...], list[int]] = {}
    for example in test.away:
        asked = lm.encode(example.prompt)
        (plain[tuple(asked.ids)],) = generation.answer_ids(lm, [asked], 4)
    written, splits = Counter[tuple[int, ...]](), Counter[int]()
    answer_ids, split = generation.answer_ids, tt.Behavior.split

    def writing(lm: LanguageModel, encoded: list[Encoded], *rest: Any) -> list[list[int]]:
        found = answer_ids(lm, encoded, *rest)
        for item, ids in zip(encoded, found, strict=True):
            written[tuple(item.ids)] += ids == plain.get(tuple(item.ids))
        return found

    def splitting(behavior: tt.Behavior, seed: int = 0) -> object:
        splits[seed] += 1
        return split(behavior, seed)

    monkeypatch.setattr(generation, "answer_ids", writing)
    monkeypatch.setattr(tt.Behavior, "split", splitting)
    tt.explain(lm, contrast, vector, strength=vector.strength, max_prompts=3, max_new_tokens=4)
    assert splits == {0: 1}
    assert BUILT["counted"] == 1
    assert [written[ids] for ids in plain] == [1] * len(plain)


def test_the_command_prints_one_screen(
    found: Explanation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a deep model: every table eight times as long."""
    *parts, findings = (replace(table, rows=table.rows * 8) for table in found.tables())
    show(findings, *parts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Why opening moves") and 10 < len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    assert "More with --full" in "\n".join(lines)


def test_circuits_of_two_vectors_are_exchanged(
    lm: LanguageModel, contrast: tt.Behavior, vector: VectorSteering, found: Explanation
) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(lm.d_model, generator=generator)
    other = VectorSteering.from_directions(lm, {1: draw}, alpha=12.0)
    limits: dict[str, Any] = {"strength": vector.strength, "max_prompts": 3, "max_new_tokens": 4}
    both = tt.explain(lm, contrast, vector, against=other, **limits)
    table = both.exchanged
    assert table is not None and table.sizes[0] == found.circuit.size
    alone = tt.explain(lm, contrast, other, **limits)
    assert table.faithfulness[0][0] == found.circuit.held_out
    assert table.faithfulness[1][1] == alone.circuit.held_out
    assert table.cosines[0][1] == pytest.approx(
        float(torch.cosine_similarity(vector.directions[1], other.directions[1], dim=0)), abs=1e-5
    )
    crossed = table.faithfulness[0][1]
    said = next(one for one in both.findings if one.part == "another vector")
    assert f"{crossed.value:.2f}" in said.said and said.choice
    titles = [one.title for one in explain_sections(both)]
    assert len(titles) == 8 and "Whether another vector takes the same way" in titles
    assert [t.title for t in both.tables() if "circuits" in t.title] == ["Overlap of circuits"]
    assert both.to_dict()["exchanged"] == table.to_dict()
    same = tt.explain(lm, contrast, vector, against=vector, **limits)
    assert same.exchanged is not None and same.exchanged.overlap[0][1] == 1
    assert len(set(same.exchanged.names)) == 2
    assert both.frozen == found.frozen and both.values == found.values


def test_vectors_of_different_places_are_refused_before_any_work(
    lm: LanguageModel, contrast: tt.Behavior, vector: VectorSteering
) -> None:
    other = VectorSteering.from_directions(lm, {2: vector.directions[1]}, alpha=12.0)
    stages: list[int] = []
    with pytest.raises(TrimtabError, match="different places"):
        tt.explain(
            lm, contrast, vector, against=other, progress=lambda done, _: stages.append(done)
        )
    with pytest.raises(TrimtabError, match="strength 0"):
        tt.explain(lm, contrast, vector, against=vector.at(0))
    assert not stages


@pytest.fixture(scope="module")
def away(vector: VectorSteering) -> VectorSteering:
    """Away from Z, which no unsteered answer shows, over the prompt alone: answers stay varied."""
    return vector.select(scope="prompt", strength=-4.0)


def test_a_strength_that_moves_nothing_is_replaced_by_the_weakest_that_works(
    lm: LanguageModel, contrast: tt.Behavior, away: VectorSteering
) -> None:
    limits: dict[str, Any] = {"max_prompts": 3, "max_new_tokens": 4}
    good = working_strength(Case(lm, contrast, away, **limits))
    assert good.moves and good.used == good.given and len(good.tried) == 1
    weak = Case(lm, contrast, away.at(-0.25), **limits)
    found = working_strength(weak)
    assert not found.tried[0].score and found.moves and found.used < -0.25
    best = max(one.score for one in found.tried)
    weaker = [one.score for one in found.tried if abs(one.strength) < abs(found.used)]
    assert all(score < NEARLY * best for score in weaker)
    own = working_strength(weak, look=False)
    assert len(own.tried) == 1 and own.used == -0.25


def test_where_no_strength_moves_anything_the_own_one_is_explained(
    lm: LanguageModel, contrast: tt.Behavior, away: VectorSteering
) -> None:
    """Over all tokens every answer ends in one letter, which is no answer."""
    everywhere = away.select(scope="all")
    found = working_strength(Case(lm, contrast, everywhere, max_prompts=3, max_new_tokens=4))
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
    both = tt.explain(
        lm, contrast, vector, direction="both", strength=vector.strength, max_prompts=2,
        max_new_tokens=3,
    )  # fmt: skip
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
    monkeypatch.setattr("trimtab.behaviors.file.load_behavior", lambda name: contrast)
    command = ["explain", "tiny", "opening", str(file), "--json", str(out)]
    command += ["--report", str(tmp_path / "why"), "--max-prompts", "2", "--max-new-tokens", "3"]
    command += ["--against", str(vector.at(0.9).save(tmp_path / "other.safetensors"))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    plain = json.loads(out.read_text())
    assert plain["explained"]["behavior"] == "opening"
    assert len(plain["exchanged"]["faithfulness"]) == 2
    assert "another vector" in (tmp_path / "why" / "index.html").read_text()
