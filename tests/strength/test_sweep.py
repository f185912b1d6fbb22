"""sweep(): both signs, one row per side at 0, the same figures as measure()."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation import measure
from trimtab.evaluation.evaluate import Evaluation, Evaluator
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.strength import sweep as sweeps
from trimtab.strength.sweep import Sweep, sweep

TOKENS = planted.TOKENS


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def close(got: Sweep, want: Sweep) -> None:
    """Texts and scores to the letter, divergences up to rounding."""
    assert [(r.strength, r.sign) for r in got.rows] == [(r.strength, r.sign) for r in want.rows]
    for mine, theirs in zip(got.rows, want.rows, strict=True):
        assert mine.samples == theirs.samples and mine.scores == theirs.scores
        for name, value in vars(theirs).items():
            if isinstance(value, float):
                assert getattr(mine, name) == pytest.approx(value, rel=1e-3, abs=1e-6), name
            else:
                assert getattr(mine, name) == value, name


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


@pytest.mark.parametrize("scope", ["prompt", "all", "last"])
def test_strengths_together_give_what_each_gives_alone(lm: LanguageModel, scope: str) -> None:
    vector = planted.push(lm, scope, layers=(1, 3))
    strengths = [-1.5, -0.2, 0, 0.1, 0.4, 1, 2]
    together, alone = (
        sweep(lm, planted.behavior(), vector, strengths, max_new_tokens=TOKENS, batched=batched)
        for batched in (True, False)
    )
    close(together, alone)
    assert len({row.damage for row in together.rows}) == 7


class Killed(Exception):
    pass


def test_a_killed_sweep_goes_on_where_it_stopped(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "GROUP", 2)
    behavior, vector, path = planted.behavior(), planted.push(lm), tmp_path / "sweep.jsonl"
    strengths = [-2, -1, -0.5, 0, 0.5, 1, 2]
    whole = sweep(lm, behavior, vector, strengths, max_new_tokens=TOKENS)
    assert whole.rows[0].alphas and whole.rows[0].samples

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        sweep(lm, behavior, vector, strengths, max_new_tokens=TOKENS, journal=path, progress=kill)
    # Cut off while the third group was being written: that group is measured again.
    path.write_bytes(path.read_bytes()[:-9])
    ran: list[float] = []
    run_many = Evaluator.run_many

    def watched(
        self: Evaluator, vector: VectorSteering, strengths: Sequence[float], sign: int
    ) -> list[Evaluation]:
        ran.extend(strengths)
        return run_many(self, vector, strengths, sign)

    monkeypatch.setattr(Evaluator, "run_many", watched)
    seen: list[tuple[int, int]] = []
    again = sweep(
        lm,
        behavior,
        vector.at(7.0),
        strengths,
        max_new_tokens=TOKENS,
        journal=path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert again == whole
    assert ran == [0, 0.5, 1, 2] and seen == [(5, 8), (6, 8), (7, 8), (8, 8)]
    ran.clear()
    assert sweep(lm, behavior, vector, strengths, max_new_tokens=TOKENS, journal=path) == whole
    assert ran == []
    more = sweep(lm, behavior, vector, [-2, 3, 4], max_new_tokens=TOKENS, journal=path)
    assert ran == [3, 4] and more.rows[0] == whole.rows[0]


def test_the_journal_of_another_sweep_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    vector, behavior = planted.push(lm), planted.behavior()
    sweep(lm, behavior, vector, [1], max_new_tokens=TOKENS, journal=path)
    others = {
        "vector": (behavior, vector.select(scope="all"), TOKENS),
        "behavior": (planted.behavior(7), vector, TOKENS),
        "max_new_tokens": (behavior, vector, 3),
    }
    for name, (data, lever, tokens) in others.items():
        with pytest.raises(TrimtabError, match=f"other work: {name} "):
            sweep(lm, data, lever, [1], max_new_tokens=tokens, journal=path)


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
