"""One push for all prompts: planted programs with known answers, and pushes that are really made."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import planted
import tiny
from tiny import forward_as
from trimtab.behaviors.behavior import Behavior, Splits
from trimtab.evaluation.readout import ReadoutTokens, gap_of, readout_tokens
from trimtab.margins.radius import gap_gradients
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.feasibility import MARGIN, Feasibility, feasibility, null_norms
from trimtab.mechanism.geometry.program import largest_share, smallest_norm
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

BEHAVIOR = planted.behavior(n=10, readout={"toward": ["Z"], "away": ["Q"]})


def test_known_norms() -> None:
    b = -np.array([1.0, 2.0, 3.0])
    orthogonal = smallest_norm(b, np.eye(3))
    assert orthogonal.norm == pytest.approx(14**0.5) and orthogonal.alone == pytest.approx(3)
    assert orthogonal.delta is not None
    np.testing.assert_allclose(orthogonal.delta, [1, 2, 3], atol=1e-9)
    parallel = smallest_norm(b, np.outer([1.0, 2.0, 0.5], [0.6, 0.8]))
    assert parallel.norm == pytest.approx(6) == parallel.alone  # 3 / 0.5
    assert np.flatnonzero(parallel.weights > 1e-9).tolist() == [2]
    with_margin = smallest_norm(b, np.eye(3), margin=1.0)
    assert with_margin.delta is not None
    np.testing.assert_allclose(with_margin.delta, [2, 3, 4], atol=1e-9)
    already = smallest_norm(np.array([0.5, 1.0]), np.eye(2))
    assert already.norm == 0 and already.delta is not None and not already.delta.any()
    # Satisfied prompts still have to stay so.
    g = np.array([[1.0, 0.0], [-1.0, 0.1]])
    both = smallest_norm(np.array([-1.0, 0.5]), g)
    assert both.delta is not None and both.norm > 1.0
    assert (np.array([-1.0, 0.5]) + g @ both.delta >= -1e-9).all()


def test_the_shortest_push_satisfies_its_optimality_conditions() -> None:
    generator = np.random.default_rng(0)
    for n, d, scale in ((30, 60, 1.0), (12, 5, 1e-4), (25, 20, 1e5)):
        g = scale * (generator.normal(size=(n, d)) + 1.5)
        b = generator.normal(size=n) - 1
        found = smallest_norm(b, g, margin=0.1)
        assert found.delta is not None
        gaps = b + g @ found.delta - 0.1
        assert gaps.min() >= -1e-7
        assert np.linalg.norm(found.delta) == pytest.approx(found.norm)
        # delta = sum of weights times gradients, weights >= 0, positive only where it is tight.
        assert (found.weights >= 0).all()
        mix = g.T @ found.weights
        cosine = mix @ found.delta / np.linalg.norm(mix) / found.norm
        assert cosine == pytest.approx(1, abs=1e-6)
        assert np.abs(gaps[found.weights > 1e-6 * found.weights.max()]).max() < 1e-5
        assert found.norm >= found.alone * (1 - 1e-9)


def test_infeasible_by_construction_comes_with_a_certificate() -> None:
    generator = np.random.default_rng(1)
    g = generator.normal(size=(6, 8))
    g[5] = -(g[0] + 2 * g[1])  # whoever moves 0 and 1 up moves 5 down
    b = -np.ones(6)
    found = smallest_norm(b, g)
    assert found.delta is None and math.isinf(found.norm)
    assert np.abs(g.T @ found.weights).max() < 1e-9 and (found.weights >= 0).all()
    assert found.weights @ b < 0  # 0 = sum w (g . delta) >= -sum w b > 0 cannot be
    np.testing.assert_allclose(found.weights[[0, 1, 5]], [0.25, 0.5, 0.25], atol=1e-6)
    solved = linprog(np.zeros(8), -g, b, bounds=[(None, None)] * 8)
    assert solved.status == 2  # infeasible, says the linear program too
    still = smallest_norm(b, np.vstack([g[:5], np.zeros((1, 8))]))
    assert still.delta is None and still.weights.tolist() == [0, 0, 0, 0, 0, 1]


def test_counts_lie_between_their_bounds() -> None:
    generator = np.random.default_rng(2)
    strict = 0
    for _ in range(8):
        g, b = generator.normal(size=(7, 3)), -generator.uniform(0.2, 1.0, 7)
        for radius in (0.3, 0.8, 2.0):
            found = largest_share(b, g, radius)
            best = 0
            for k in range(7, 0, -1):
                some = itertools.combinations(range(7), k)
                if any(smallest_norm(b[list(s)], g[list(s)]).norm <= radius + 1e-9 for s in some):
                    best = k
                    break
            assert found.count <= best <= found.bound
            strict += found.count == best
            assert np.linalg.norm(found.delta) <= radius * (1 + 1e-9)
            assert int((b + g @ found.delta >= -1e-8).sum()) == found.count
    assert strict >= 18  # of 24


def test_two_camps_and_what_no_push_can_reach() -> None:
    e = np.eye(4)[0]
    g = np.vstack([np.tile(e, (6, 1)), np.tile(-e, (4, 1))])
    b = -np.ones(10)
    found = largest_share(b, g, 2.0)
    assert found.count == 6 and 6 <= found.bound < 10
    assert largest_share(b, g, 0.5).bound == 0  # each needs a length of 1
    everyone = largest_share(b[:6], g[:6], 1.0)
    assert everyone.count == everyone.bound == 6


def test_the_null_of_parallel_gradients_is_much_longer() -> None:
    g = np.tile(np.eye(100)[0], (16, 1))
    norms = null_norms(-np.ones(16), g, 0.0, seed=0)
    assert 3.0 < min(norms) <= max(norms) < 6.0  # about sqrt(16): sixteen orthogonal demands


def found_for(
    lm: LanguageModel,
    own: VectorSteering,
    tokens: ReadoutTokens,
    train: Behavior,
    test: Behavior,
    layer: int,
    most: tuple[int, int],
) -> Feasibility:
    case = Case(lm, BEHAVIOR, own)
    case.readout, case.splits = tokens, Splits(train, test, test)
    gradients = {}
    for side in ("toward", "away"):
        some = getattr(train, side)[: most[0]]
        gradients[side] = gap_gradients(lm, tokens, [lm.encode(e.prompt) for e in some])
    return feasibility(case, layer, most, gradients)


def straight() -> tuple[LanguageModel, ReadoutTokens]:
    lm = tiny.language_model("llama")
    found = readout_tokens(lm, BEHAVIOR)
    return lm, ReadoutTokens(found.toward[:1], found.away[:1], (), found.texts)


@pytest.mark.parametrize("pushed", ["toward", "away"])
def test_where_the_gap_is_linear_the_push_does_what_it_says(pushed: str) -> None:
    """Without the final norm every gradient is w: feasible, one prompt binds, and really so."""
    lm, tokens = straight()
    if pushed == "away":  # the gap of this model is positive everywhere: turned round, negative
        tokens = ReadoutTokens(tokens.away, tokens.toward, (), tokens.texts)
    norm = lm.sites.final_norm
    assert norm is not None
    train = BEHAVIOR.select({side: range(0, 6) for side in ("toward", "away")})
    test = BEHAVIOR.select({side: range(6, 10) for side in ("toward", "away")})
    rows = lm.sites.unembedding.get_parameter("weight").detach().double()
    w = rows[tokens.toward[0]] - rows[tokens.away[0]]
    own = VectorSteering.from_directions(lm, {3: w})
    with forward_as(norm, lambda hidden: hidden):
        report = found_for(lm, own, tokens, train, test, 3, (6, 4))
        gaps = {
            side: gap_of(lm.next_logits([e.prompt for e in getattr(train, side)]), tokens, "max")
            for side in ("toward", "away")
        }
    assert report.held_out == {"away": 4, "toward": 4}
    for row in report.rows:
        up = 1 if row.side == "away" else -1
        need = MARGIN - up * gaps[row.side]
        assert float(need.max()) > 0 or not row.pushed
        if not row.pushed:
            continue
        assert row.feasible and row.norm == pytest.approx(row.alone, rel=1e-4)
        assert row.works == 1.0
        by_name = {one.direction: one for one in row.pushed}
        for name in ("program", "mean gradient", "vector"):
            assert by_name[name].train.share == 1.0
            assert 0 <= by_name[name].test.share <= 1
        assert by_name["random"].train.share < 1.0
        # Half of that length: those whose own need is smaller still cross, no others.
        counts = [one.count for one in row.within]
        assert counts == sorted(counts) and row.within[0].n == 6
    assert [row.side for row in report.rows if row.pushed] == [pushed]
    json.dumps(report.to_dict())
    assert len(report.tables()) == 2


def test_on_every_architecture(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, BEHAVIOR)
    own = VectorSteering.from_directions(lm, {2: torch.ones(lm.d_model)})
    report = found_for(lm, own, tokens, BEHAVIOR, BEHAVIOR, 2, (6, 4))
    assert [row.side for row in report.rows] == ["away", "toward"]
    for row in report.rows:
        assert row.feasible == math.isfinite(row.norm)
        if row.feasible and row.norm:
            assert row.alone * (1 - 1e-6) <= row.norm
            assert {one.direction for one in row.pushed} == {
                "program", "mean gradient", "vector", "random",
            }  # fmt: skip
