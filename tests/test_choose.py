"""choose(): the best sound cell of the grid, confirmed on all prompts, or a refusal."""

from typing import Any

import pytest

import planted
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.strength.choose import Choice, NoStrengthPasses, choose
from trimtab.strength.sweep import sweep

TOKENS = planted.TOKENS
LAYERS = [(0,), (3,)]
STRENGTHS = [0.1, 0.25, 1.0]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def pick(lm: LanguageModel, scope: str = "prompt", **more: Any) -> Choice:
    options: dict[str, Any] = {
        "layers": LAYERS,
        "strengths": STRENGTHS,
        "coherence_floor": 0.8,
        "screen": 4,
    }
    return choose(
        lm,
        planted.behavior(),
        planted.push(lm, scope=scope),
        **{**options, "max_new_tokens": TOKENS, **more},
    )


def test_it_finds_the_planted_layer_at_the_least_damage(lm: LanguageModel) -> None:
    choice = pick(lm)
    vector = planted.push(lm)
    curve = {}
    for layers in LAYERS:
        at = vector.select(layers=layers)
        rows = sweep(lm, planted.behavior(), at, STRENGTHS, max_new_tokens=TOKENS).rows
        curve |= {(layers, row.strength): row for row in rows}
    sound = {cell: row for cell, row in curve.items() if row.coherence >= 0.8}
    best = min(sound, key=lambda cell: (-sound[cell].score, sound[cell].damage_p95))
    assert (choice.vector.layers, choice.vector.strength) == best
    assert choice.vector.layers == (3,)
    assert choice.chosen.row.score == sound[best].score > choice.baseline.score
    assert choice.chosen.row.n == 8  # confirmed on all prompts, not on the screened 4


def test_every_cell_is_reported(lm: LanguageModel) -> None:
    choice = pick(lm)
    screened = [t for t in choice.tried if t.stage == "screened"]
    assert sorted((t.layers, t.row.strength) for t in screened) == sorted(
        (at, m) for at in LAYERS for m in STRENGTHS
    )
    assert {t.row.n for t in screened} == {4}
    assert [t.verdict for t in choice.tried].count("chosen") == 1
    assert "chosen" in str(choice) and "unsteered" in str(choice)
    assert choice.to_dict()["tried"]


def test_a_damage_budget_excludes_what_breaks_it(lm: LanguageModel) -> None:
    free = pick(lm, strengths=[1.0, 2.0], layers=[(3,)])
    budget = free.chosen.row.damage_p95 * 0.5
    tight = pick(lm, strengths=[0.25, 1.0, 2.0], layers=[(3,)], damage_budget=budget)
    assert tight.vector.strength == 0.25
    assert tight.chosen.row.damage_p95 <= budget
    assert any(t.verdict == "damage" for t in tight.tried)


def test_the_away_side_gives_negative_strengths(lm: LanguageModel) -> None:
    choice = pick(lm, sign=-1, strengths=[-2.0, 3.0], layers=[(3,)])
    assert choice.vector.strength in (-2.0, -3.0)
    assert choice.chosen.row.sign == -1 and choice.chosen.row.score == 1.0


def test_collapse_is_refused_with_the_curve(lm: LanguageModel) -> None:
    with pytest.raises(NoStrengthPasses, match="coherence") as caught:
        pick(lm, scope="all", strengths=[0.5, 1.0], layers=[(3,)])
    error = caught.value
    assert [t.verdict for t in error.tried] == ["coherence", "coherence"]
    assert {t.stage for t in error.tried} == {"screened"}  # hopeless cells are not confirmed
    assert error.tried[0].row.score == 1.0  # a high score alone does not pass
    assert "score 1.00" in error.found and "coherence" in error.table().to_text(200)


def test_a_lever_that_does_nothing_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(NoStrengthPasses, match="no gain"):
        pick(lm, layers=[(0,)], strengths=[1e-4])


def test_an_impossible_budget_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(NoStrengthPasses, match="damage") as caught:
        pick(lm, layers=[(3,)], damage_budget=0.0)
    assert any(t.stage == "confirmed" for t in caught.value.tried)


def test_an_empty_grid_is_refused(lm: LanguageModel) -> None:
    grids: list[dict[str, Any]] = [{"layers": []}, {"strengths": [0.0]}, {"screen": 0}]
    for empty in grids:
        with pytest.raises(TrimtabError, match="at least one"):
            pick(lm, **empty)


def test_progress_reaches_its_total(lm: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    pick(lm, layers=[(3,)], progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] <= seen[-1][1]
