"""calibration(): the norm profile, the protocol's rows, and the cliff where coherence collapses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import planted
from trimtab.evaluation.coherence import coherence_for
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import decisions
from trimtab.passes.rollout import rollout
from trimtab.prediction.calibration import (
    FURTHEST,
    NEAREST,
    STEP,
    Calibration,
    calibration,
    cliff,
)
from trimtab.steering.norms import calibrate
from trimtab.steering.vector import VectorSteering

UNIT = 4.0  # raw alpha at m = 1


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def evaluator(lm: LanguageModel) -> Evaluator:
    return Evaluator(lm, planted.behavior(), max_new_tokens=planted.TOKENS)


def run(lm: LanguageModel, vector: VectorSteering, **more: Any) -> Calibration:
    options: dict[str, Any] = {"layers": [(3,)], "scopes": ["all"], "signs": [1]}
    return calibration(
        lm, planted.behavior(), vector, max_new_tokens=planted.TOKENS, **{**options, **more}
    )


@pytest.fixture(scope="module")
def found(lm: LanguageModel) -> Calibration:
    """A unit such that the cliff lies in the protocol's range; a scope without one as well."""
    push = planted.push(lm, layers=(0, 3))
    weak = VectorSteering.from_directions(lm, push.directions, alpha=UNIT)
    return run(lm, weak, scopes=["all", "prompt"], signs=[1, -1], strengths=[0.5, 2.0])


@pytest.fixture(scope="module")
def edges(lm: LanguageModel) -> dict[int, float]:
    """By side, the first |m| of a fine grid whose mean coherence is under one half."""
    behavior, grid = planted.behavior(), [0.1 * 1.02**i for i in range(250)]
    push = planted.push(lm, scope="all")
    weak = VectorSteering.from_directions(lm, {3: push.directions[3]}, alpha=UNIT)
    result = {}
    for side in (1, -1):
        prompts = evaluator(lm).prompts("away" if side > 0 else "toward")
        signed = [side * m for m in grid]
        answers = rollout(lm, weak, prompts, signed, max_new_tokens=planted.TOKENS)
        means = [mean(coherence_for(behavior)(said)) for said in answers]
        result[side] = next(m for m, value in zip(grid, means, strict=True) if value < 0.5)
    return result


def test_the_norms_are_those_of_the_model(found: Calibration, lm: LanguageModel) -> None:
    own = calibrate(lm).mean
    assert found.norms == own and sorted(found.norms) == [0, 1, 2, 3]
    assert found.grows == (own[0] < own[1] < own[2] < own[3])


def test_rows_are_those_of_the_evaluator(found: Calibration, lm: LanguageModel) -> None:
    places = [(p.layers, p.scope, p.sign) for p in found.places]
    assert places == [((3,), scope, sign) for scope in ("all", "prompt") for sign in (1, -1)]
    place = found.places[1]
    assert [row.strength for row in place.rows] == [-0.5, -1.0, -2.0, -3.0]  # 1 and 3 are added
    push = planted.push(lm, scope="all")
    weak = VectorSteering.from_directions(lm, {3: push.directions[3]}, alpha=UNIT)
    result = evaluator(lm).run(weak.at(-2.0), -1)
    assert place.at(2.0).score == sum(result.scores) / len(result.scores)
    assert place.at(2.0).damage_p95 == pytest.approx(result.damage(0).p95, rel=1e-3)


def test_the_cliff_is_where_a_fine_grid_finds_it(
    found: Calibration, lm: LanguageModel, edges: dict[int, float]
) -> None:
    push = planted.push(lm, scope="all")
    weak = VectorSteering.from_directions(lm, {3: push.directions[3]}, alpha=UNIT)
    for place in found.places[:2]:
        assert place.cliff is not None
        assert 0.98 <= place.cliff / edges[place.sign] <= STEP  # the grid's own step is 2 %
        prompts = evaluator(lm).prompts("away" if place.sign > 0 else "toward")
        at = decisions(lm, weak, prompts)
        share = weak.scales[3] / at.stream.norm(dim=-1)
        assert place.cliff_push == pytest.approx(place.cliff * float(share.mean()), rel=1e-3)


def test_where_nothing_collapses_there_is_no_cliff(found: Calibration) -> None:
    assert [(p.cliff, p.cliff_push) for p in found.places[2:]] == [(None, None)] * 2


@pytest.mark.parametrize("place", [0.05, 0.4, 20.0])
def test_the_cliff_is_found_far_below_and_far_beyond_the_protocol(
    lm: LanguageModel, edges: dict[int, float], place: float
) -> None:
    push = planted.push(lm, scope="all")
    # In this unit the cliff of the grid lies at m = place.
    unit = UNIT * edges[1] / place
    scaled = VectorSteering.from_directions(lm, {3: push.directions[3]}, alpha=unit)
    alone = cliff(evaluator(lm), scaled, 1)
    (measured,) = run(lm, scaled, strengths=[0.5]).places
    for own in (alone, measured.cliff):
        assert own is not None and 0.98 <= own / place <= STEP


NO_VECTOR: Any = None


class _Steps:
    """An evaluator of a model whose coherence falls at given strengths; it notes what it is asked."""

    def __init__(self, coherence: Callable[[float], float]) -> None:
        self.coherence, self.asked = coherence, []

    def run_many(self, vector: object, strengths: Sequence[float], side: int) -> list[Any]:
        self.asked += [abs(m) for m in strengths]
        assert all(m * side > 0 for m in strengths)
        return [_Result((self.coherence(abs(m)),)) for m in strengths]


class _Result:
    def __init__(self, coherences: tuple[float, ...]) -> None:
        self.coherences = coherences


@pytest.mark.parametrize("edge", [0.01, 0.3, 0.99, 1.01, 5.0, 63.0, 100.0, 127.9])
@pytest.mark.parametrize("side", [1, -1])
def test_any_edge_is_found_to_a_sixth_of_a_doubling(edge: float, side: int) -> None:
    steps: Any = _Steps(lambda m: float(m < edge))
    own = cliff(steps, NO_VECTOR, side)
    assert own is not None and edge <= own <= STEP * edge
    assert max(steps.asked) <= FURTHEST and len(steps.asked) < 40


def test_edges_outside_the_search() -> None:
    never: Any = _Steps(lambda m: 1.0)
    assert cliff(never, NO_VECTOR, 1) is None and max(never.asked) == FURTHEST
    always: Any = _Steps(lambda m: 0.0)
    assert cliff(always, NO_VECTOR, 1) == 0.0 and min(always.asked) == NEAREST


def test_it_prints_and_saves(found: Calibration, tmp_path: Path) -> None:
    table = found.table()
    assert len(table.rows) == 4 and [row[5] for row in table.rows[2:]] == ["none", "none"]
    assert [row[2] for row in table.rows] == ["toward", "away", "toward", "away"]
    assert "norms by layer 0: " in table.notes[0]
    kept = json.loads(found.save(tmp_path / "c.json").read_text())
    assert kept["places"][0]["cliff"] == found.places[0].cliff
    assert list(kept["norms"]) == ["0", "1", "2", "3"]
    assert kept["places"][0]["rows"][0]["samples"] == []


def test_places_by_default_are_single_layers_and_the_range(lm: LanguageModel) -> None:
    push, seen = planted.push(lm, layers=(0, 1, 2, 3)), []
    found = run(
        lm, push, layers=None, strengths=[], max_prompts=1, progress=lambda *at: seen.append(at)
    )
    assert [p.layers for p in found.places] == [(1,), (2,), (3,), (1, 2)]
    assert seen == [(i, 4) for i in range(1, 5)]
    alone = VectorSteering.from_directions(lm, {3: push.directions[3]})
    (place,) = run(lm, alone, layers=None, strengths=[], max_prompts=1).places
    assert place.layers == (3,)
    assert {row.n for p in found.places for row in p.rows} == {1}
