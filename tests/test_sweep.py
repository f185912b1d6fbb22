"""sweep(): both signs, one row per side at 0, the same figures as measure()."""

import pytest

import planted
from trimtab.errors import TrimtabError
from trimtab.measure import measure
from trimtab.model import LanguageModel
from trimtab.strength.sweep import sweep

TOKENS = planted.TOKENS


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def test_rows_are_ordered_and_zero_is_measured_on_both_sides(lm: LanguageModel) -> None:
    vector = planted.push(lm)
    result = sweep(lm, planted.behavior(), vector, [1, -2, 0, 0.5, 1], max_new_tokens=TOKENS)
    assert [(r.strength, r.sign) for r in result.rows] == [
        (-2, -1),
        (0, -1),
        (0, 1),
        (0.5, 1),
        (1, 1),
    ]
    assert [r.strength for r in result.side(1)] == [0, 0.5, 1]
    for row in result.rows[1:3]:
        assert (row.damage, row.damage_p95, row.spill) == (0, 0, 0)
    assert result.rows[0].score == 1.0 and result.rows[-1].score == 1.0
    assert result.rows[2].score < 1.0
    assert result.rows[0].alphas == {3: pytest.approx(-20.0)}


def test_every_row_has_n_and_an_interval(lm: LanguageModel) -> None:
    result = sweep(lm, planted.behavior(), planted.push(lm), [-1, 1], max_new_tokens=TOKENS)
    for row in result.rows:
        assert row.n == 8
        assert row.low <= row.score <= row.high and row.low < row.high
        assert row.damage_low <= row.damage <= row.damage_high


def test_damage_grows_with_strength(lm: LanguageModel) -> None:
    strengths = [0, 0.1, 0.2, 0.4, 0.8]
    rows = sweep(lm, planted.behavior(), planted.push(lm), strengths, max_new_tokens=TOKENS).side(1)
    damages = [row.damage for row in rows]
    assert damages == sorted(damages) and damages[1] > 0
    # KL is quadratic in small strengths
    assert rows[2].damage / rows[1].damage == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("m", [1.0, -1.0])
def test_a_row_equals_the_row_that_measure_gives(lm: LanguageModel, m: float) -> None:
    behavior, vector = planted.behavior(), planted.push(lm)
    row = sweep(lm, behavior, vector, [m], max_new_tokens=TOKENS).rows[0]
    measured = measure(lm, behavior, [vector.at(m)], split=None, nulls=0, max_new_tokens=TOKENS)
    other = measured.rows[1]
    for name in ("sign", "score", "low", "high", "coherence", "damage", "damage_p95", "spill"):
        assert getattr(row, name) == getattr(other, name), name
    assert row.scores == other.scores


def test_ablation_has_strengths_but_no_raw_alpha(lm: LanguageModel) -> None:
    vector = planted.push(lm, scope="all").select(operation="ablate")
    row = sweep(lm, planted.behavior(), vector, [1], max_new_tokens=TOKENS).rows[0]
    assert row.alphas == {} and row.damage > 0
    assert "–" in str(sweep(lm, planted.behavior(), vector, [1], max_new_tokens=TOKENS))


def test_it_prints_and_converts(lm: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    result = sweep(
        lm,
        planted.behavior(neutral=()),
        planted.push(lm),
        [-1, 0, 1],
        max_new_tokens=TOKENS,
        max_prompts=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "toward" in str(result) and "away" in str(result)
    rows = result.to_dict()["rows"]
    assert isinstance(rows, list) and rows[0]["strength"] == -1.0 and rows[0]["spill"] is None


def test_no_strengths_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no strengths"):
        sweep(lm, planted.behavior(), planted.push(lm), [])
