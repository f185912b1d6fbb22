"""tune(): finds the planted lever within a budget of damage, or refuses with what was tried."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.judges import Verdict, register_judge
from trimtab.models.model import LanguageModel
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering
from trimtab.strength import search as search_module
from trimtab.strength.adaptive import adaptive_strengths, common_goal
from trimtab.strength.core import Bounds
from trimtab.strength.screen import Candidate, Odds, best_within, candidates, crossing
from trimtab.strength.search import Search
from trimtab.strength.sweep import NoStrengthPasses
from trimtab.strength.tune import Tuned, TuneReport, tune

CONTRACT = """layers scope strength alpha window score low high coherence damage damage_p95 spill
    spill_p95 model_calls seconds null""".split()
WORDS = [f"{kind} {word}" for kind in ("old", "new", "red", "big") for word in planted.WORDS]
HERE: dict[str, Any] = {"layers": [(3,)], "scope": ["prompt"]}


@register_judge("test-side")
def side_judge(behavior: Behavior, options: Any) -> Any:
    """Toward or away by the prompt alone, whatever is answered: nothing can be steered."""

    def judge(prompts: Any, answers: Any) -> list[Verdict]:
        return [Verdict(float(p.startswith("Say")), float(p.startswith("How"))) for p in prompts]

    return judge


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def behavior(lm: LanguageModel) -> Behavior:
    """Prompts whose unsteered answers are not on the wanted side by themselves."""

    def kept(text: str, letter: str) -> list[str]:
        listed = [text.format(word) for word in WORDS]
        answers = lm.generate(listed, max_new_tokens=planted.TOKENS)
        return [p for p, a in zip(listed, answers, strict=True) if not a.startswith(letter)][:32]

    return planted.behavior(
        toward=kept("Say something about the {}.", "Q"),
        away=kept("How do I find the {}?", "Z"),
        neutral=[f"Please, the {word}" for word in WORDS[:6]],
        readout={"toward": ["Z"], "away": ["Q"]},
    )


def vector(lm: LanguageModel) -> VectorSteering:
    return planted.push(lm, layers=(0, 1, 2, 3))


def pick(lm: LanguageModel, behavior: Behavior, budget: float = 1.0, **more: Any) -> Tuned:
    options: dict[str, Any] = {"max_new_tokens": planted.TOKENS, "coherence_floor": 0.8, **HERE}
    return tune(lm, behavior, more.pop("push", vector(lm)), budget, **{**options, **more})


@pytest.fixture(scope="module")
def tuned(lm: LanguageModel, behavior: Behavior) -> Tuned:
    """Every place, with an adaptive strength as well."""
    return pick(lm, behavior, layers=None, scope=None, adaptive=True)


@pytest.fixture(scope="module")
def here(lm: LanguageModel, behavior: Behavior) -> TuneReport:
    """The planted place alone."""
    return pick(lm, behavior).report


def test_it_finds_the_planted_lever(tuned: Tuned) -> None:
    report = tuned.report
    assert tuned.layers == report.layers == (3,)
    assert tuned.strength == report.strength > 0 and report.alpha == tuned.alphas
    assert report.score == 1.0 and report.score > max(report.baseline, report.null)
    assert report.low <= report.score <= report.high
    assert 0 < report.gain_low <= report.gain == report.score - report.baseline
    assert report.coherence >= 0.8
    assert report.window is not None and report.window[0] <= tuned.strength <= report.window[1]
    looked = {(c.layers, c.scope) for c in report.candidates}
    assert {((k,), scope) for k in range(4) for scope in ("prompt", "all", "last")} <= looked
    assert {t.stage for t in report.tried} == {"screened", "confirmed"}


def test_the_test_split_is_measured_as_by_hand(
    tuned: Tuned, lm: LanguageModel, behavior: Behavior
) -> None:
    test = Evaluator(lm, behavior.split(0).test, max_new_tokens=planted.TOKENS)
    result = test.run(VectorSteering.at(tuned, tuned.strength), 1)
    assert tuned.report.n == len(result.scores)
    assert tuned.report.score == sum(result.scores) / len(result.scores)
    assert tuned.report.damage_p95 == pytest.approx(result.damage(0).p95, rel=1e-3)
    spill = result.spill(0)
    assert spill is not None and tuned.report.spill == pytest.approx(spill.mean, rel=1e-3)


def test_the_validation_split_keeps_the_budget(
    tuned: Tuned, lm: LanguageModel, behavior: Behavior
) -> None:
    validation = Evaluator(lm, behavior.split(0).validation, max_new_tokens=planted.TOKENS)
    reference = Reference(lm, validation.prompts("toward"), validation.unsteered("toward"))
    own = summarize(reference.kl(tuned.at(tuned.strength))).p95
    assert tuned.report.validation.damage_p95 == pytest.approx(own, rel=1e-3)
    assert own <= 1.02 * tuned.report.budget


def test_every_key_of_the_contract_is_written(tuned: Tuned, tmp_path: Path) -> None:
    kept = json.loads(tuned.report.save(tmp_path / "tune.json").read_text())
    assert set(CONTRACT) <= set(kept) and kept == json.loads(json.dumps(tuned.to_dict()))
    assert kept["layers"] == [3] and kept["alpha"] == {"3": tuned.alphas[3]}
    assert kept["model_calls"] > 1000 and kept["seconds"] > 0
    assert [row["strength"] for row in kept["curve"]] == sorted(
        row["strength"] for row in kept["curve"]
    )
    for word in ("chosen", "test split", "random control", "adaptive", "model calls"):
        assert word in str(tuned.table()) and word in str(tuned.report)


def test_it_is_a_steering_vector(tuned: Tuned, lm: LanguageModel, tmp_path: Path) -> None:
    prompt = "How do I find the cats?"
    with tuned.on(lm):
        assert lm.generate(prompt, max_new_tokens=3).startswith("Z")
    for plain in (tuned.at(0.5), tuned.select(scope="last")):
        assert type(plain) is VectorSteering
    assert tuned.at(0.5).strength == 0.5 and tuned.select(scope="last").strength == tuned.strength
    loaded = load_steering(tuned.save(tmp_path / "v.safetensors"))
    assert isinstance(loaded, VectorSteering) and loaded.strength == tuned.strength
    assert (loaded.layers, loaded.scope) == (tuned.layers, tuned.scope)
    assert loaded.provenance["tuned"]["budget"] == 1.0
    torch.testing.assert_close(loaded.directions[3], tuned.directions[3])


def test_adaptive_strengths_stay_between_zero_and_the_windows_end(
    tuned: Tuned, lm: LanguageModel, behavior: Behavior
) -> None:
    found, window = tuned.report.adaptive, tuned.report.window
    assert found is not None and window is not None
    assert len(found.strengths) == tuned.report.n
    assert all(0 <= m <= window[1] for m in found.strengths) and len(set(found.strengths)) > 1
    assert found.mean == pytest.approx(sum(found.strengths) / len(found.strengths))
    assert found.score == 1.0 and found.low <= found.score <= found.high


def test_an_adaptive_step_brings_every_prompt_nearer_the_goal(
    lm: LanguageModel, behavior: Behavior
) -> None:
    odds, push = Odds(lm, behavior, 1), vector(lm).select(layers=(3,), strength=0.3)
    listed = [e.prompt for e in behavior.away]
    goal = common_goal(lm, push, odds, listed)
    own = adaptive_strengths(lm, push, odds, listed, goal, (0.0, 2.0))
    levels = []
    for strengths in ([0.3] * len(listed), own):
        with push.on(lm, row_strengths=strengths):
            levels.append(odds(lm.next_logits(listed)))
    assert float(levels[0].median()) == pytest.approx(goal, abs=1e-4)
    fixed, stepped = ((level - goal).abs().mean() for level in levels)
    assert stepped < 0.3 * fixed and all(0 <= m <= 2 for m in own)
    # Prompts that already show more of it are given less.
    more = levels[0] > goal + 0.1
    assert all(m < 0.3 for m, is_more in zip(own, more, strict=True) if is_more)
    cut = adaptive_strengths(lm, push, odds, listed, goal + 100, (0.0, 0.35))
    assert set(cut) == {0.35}


def test_a_smaller_budget_gives_a_smaller_strength(
    lm: LanguageModel, behavior: Behavior, here: TuneReport
) -> None:
    reports = [here, pick(lm, behavior, 0.1).report]
    strengths = [report.strength for report in reports]
    assert strengths[0] > 2 * strengths[1] > 0
    for report in reports:
        assert report.validation.damage_p95 <= 1.02 * report.budget
        assert (report.layers, report.scope) == ((3,), "prompt")


def test_the_away_side_gives_a_negative_strength(lm: LanguageModel, behavior: Behavior) -> None:
    tuned = pick(lm, behavior, 2.0, direction="away", adaptive=True)
    report = tuned.report
    assert report.sign == -1 and tuned.strength < 0 and report.alpha[3] < 0
    assert report.score > report.baseline and "away" in str(report)
    assert report.window is not None and report.adaptive is not None
    assert report.window[0] <= tuned.strength <= report.window[1] < 0
    assert all(report.window[0] <= m <= 0 for m in report.adaptive.strengths)


def test_the_same_seed_gives_the_same_report(
    lm: LanguageModel, behavior: Behavior, here: TuneReport
) -> None:
    seen: list[tuple[int, int]] = []
    again = pick(lm, behavior, progress=lambda done, total: seen.append((done, total))).report
    assert dataclasses.replace(again, seconds=here.seconds).to_dict() == here.to_dict()
    assert behavior.split(1).test.data_hash != behavior.split(0).test.data_hash
    assert pick(lm, behavior, seed=1).report.damage != here.damage
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_a_random_direction_is_refused(lm: LanguageModel, behavior: Behavior, alpha: float) -> None:
    generator = torch.Generator().manual_seed(3)
    directions = {k: torch.randn(lm.d_model, generator=generator) for k in (0, 3)}
    push = VectorSteering.from_directions(lm, directions, alpha=alpha)
    with pytest.raises(NoStrengthPasses) as caught:
        pick(lm, behavior, 0.1, push=push, layers=[(0,), (3,), (0, 3)])
    assert caught.value.baseline.score == 0.0
    tried = caught.value.tried
    assert all(t.row.score < 0.2 for t in tried)
    assert not any(t.verdict == "passed" for t in tried if t.stage == "confirmed")


def test_what_does_not_reach_the_answers_first_token_is_refused(
    lm: LanguageModel, behavior: Behavior
) -> None:
    with pytest.raises(NoStrengthPasses, match="no place moves the readout") as caught:
        pick(lm, behavior, scope=["generated"])
    assert caught.value.tried == () and caught.value.baseline.score == 0.0


def test_a_behavior_that_no_answer_can_change_is_refused(
    lm: LanguageModel, behavior: Behavior
) -> None:
    fixed = planted.behavior(
        toward=behavior.toward, away=behavior.away, judge="test-side", readout=behavior.readout
    )
    with pytest.raises(NoStrengthPasses, match="no gain") as caught:
        pick(lm, fixed)
    error = caught.value
    assert error.tried and {t.verdict for t in error.tried} == {"no gain"}
    assert {t.scope for t in error.tried} == {"prompt"}
    assert "unsteered" in str(error.table()) and "m = +" in error.found


def test_shuffled_sides_are_refused(lm: LanguageModel, behavior: Behavior) -> None:
    """The words that the readout moves are those that the judge does not look for."""
    swapped = planted.behavior(
        toward=behavior.toward,
        away=behavior.away,
        readout={"toward": ["Q"], "away": ["Z"]},
        neutral=behavior.neutral,
    )
    push = vector(lm)
    against = VectorSteering.from_directions(lm, {3: -push.directions[3]}, alpha=10.0)
    with pytest.raises(NoStrengthPasses):
        pick(lm, swapped, push=against)


def test_a_place_that_cannot_be_steered_says_why(plain: LanguageModel) -> None:
    behavior = planted.behavior(n=10, readout={"toward": ["Z"], "away": ["Q"]})
    with pytest.raises(NoStrengthPasses, match="no chat template"):
        pick(plain, behavior, push=vector(plain), scope=["post_instruction"])


def test_without_neutral_prompts_there_is_no_spill(lm: LanguageModel, behavior: Behavior) -> None:
    bare = planted.behavior(
        toward=behavior.toward, away=behavior.away, neutral=[], readout=behavior.readout
    )
    report = pick(lm, bare).report
    assert (report.spill, report.spill_p95) == (None, None) and report.score == 1.0
    with pytest.raises(TrimtabError, match="no neutral prompt"):
        pick(lm, bare, spill_budget=0.5)


def test_a_budget_of_spill_excludes_what_breaks_it(
    lm: LanguageModel, behavior: Behavior, here: TuneReport
) -> None:
    assert here.validation.spill_p95 is not None
    with pytest.raises(NoStrengthPasses, match="spill"):
        pick(lm, behavior, spill_budget=here.validation.spill_p95 / 1e6)


def test_between_too_weak_and_too_strong_it_looks_once_more(
    lm: LanguageModel, behavior: Behavior, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, options = vector(lm).select(layers=(3,)), (planted.TOKENS, None, 0)
    search = Search(lm, behavior.split(0).validation, push, Bounds(0.05, 0.8), 1, *options)
    place = Candidate((3,), "prompt", 5.0, 5.0, 1.0)
    monkeypatch.setattr(Search, "refine", lambda self, vector, limit, *more: limit)
    monkeypatch.setattr(search_module, "SHARES", (0.002, 1.0))
    monkeypatch.setattr(search_module, "BETWEEN", 0.06)
    found = search.answer(place, 5.0)
    assert [t.verdict for t in found] == ["no gain", "damage", "passed"]
    assert found[-1].row.strength == pytest.approx(0.3)
    monkeypatch.setattr(search_module, "BACKED", (0.5, 0.06, 0.01))
    confirmed = search.confirm(found[1])
    assert [t.verdict for t in confirmed][-1] == "passed"
    assert [t.row.strength for t in confirmed][0] == 5.0
    assert {t.verdict for t in confirmed[:-1]} == {"damage"}


def test_a_cell_says_what_it_fails_by(lm: LanguageModel, behavior: Behavior) -> None:
    push, options = vector(lm).select(layers=(3,)), (planted.TOKENS, None, 0)
    search = Search(lm, behavior.split(0).validation, push, Bounds(0.05, 0.8), 1, *options)
    verdicts = {
        (str(at.scope), at.strength): search.measured(search.full, at, [at.strength], "confirmed")[
            0
        ].verdict
        for at in (push.at(0.3), push.at(5.0), push.at(0.01), push.select(scope="all").at(5.0))
    }
    assert verdicts == {
        ("prompt", 0.3): "passed",
        ("prompt", 5.0): "damage",
        ("prompt", 0.01): "no gain",
        ("all", 5.0): "coherence",
    }


def test_the_window_holds_a_strength_between_those_of_the_curve(
    lm: LanguageModel, behavior: Behavior
) -> None:
    """Confirming a weaker strength of the curve may back off from it."""
    push, options = vector(lm).select(layers=(3,), strength=0.3), (planted.TOKENS, None, 0)
    search = Search(lm, behavior.split(0).validation, push, Bounds(5.0, 0.8), 1, *options)
    rows = search.curve(push)
    search.passed = search.measured(search.full, push, [0.27], "confirmed")[0].row
    found = search.window(rows)
    assert found is not None and found[0] <= 0.27 <= found[1]
    search.passed = dataclasses.replace(search.passed, score=0.0)
    assert search.window(rows) is None


def test_an_impossible_floor_names_coherence(lm: LanguageModel, behavior: Behavior) -> None:
    with pytest.raises(NoStrengthPasses, match="coherence"):
        pick(lm, behavior, scope=["all"], layers=[(3,)], coherence_floor=1.0)


@pytest.mark.parametrize(
    ("budget", "more"),
    [
        (0.0, {}),
        (-1.0, {}),
        (float("nan"), {}),
        (float("inf"), {}),
        (1.0, {"target": 0.0}),
        (1.0, {"target": 1.5}),
        (1.0, {"coherence_floor": 2.0}),
        (1.0, {"spill_budget": float("nan")}),
        (1.0, {"spill_budget": 0.0}),
    ],
)
def test_numbers_out_of_range_are_refused(
    lm: LanguageModel, behavior: Behavior, budget: float, more: dict[str, Any]
) -> None:
    with pytest.raises(TrimtabError, match="to tune within") as caught:
        pick(lm, behavior, budget, **more)
    assert not isinstance(caught.value, NoStrengthPasses)


@pytest.mark.parametrize("more", [{"layers": []}, {"scope": []}])
def test_no_place_at_all_is_refused(
    lm: LanguageModel, behavior: Behavior, more: dict[str, Any]
) -> None:
    with pytest.raises(TrimtabError, match="at least one of each"):
        pick(lm, behavior, **more)


def test_places_are_the_vectors_own_the_layers_and_the_range(lm: LanguageModel) -> None:
    push = planted.push(lm, scope="last", layers=(0, 3))
    placed = [(v.layers, str(v.scope)) for v in candidates(lm, push, None, ["all"])]
    assert placed == [((0, 3), "all"), ((0,), "all"), ((1,), "all"), ((2,), "all"), ((3,), "all"),
                      ((1, 2), "all")]  # fmt: skip
    scopes = [str(v.scope) for v in candidates(lm, push, [(3,)], None)]
    assert scopes == ["last", "all", "post_instruction"]
    alone = VectorSteering.from_directions(lm, {3: push.directions[3]})
    assert {v.layers for v in candidates(lm, alone, None, None)} == {(3,)}
    with pytest.raises(TrimtabError, match="directions for the layers"):
        candidates(lm, alone, [(1,)], None)


def test_crossing_interpolates_in_log_strength() -> None:
    strengths = [1.0, 2.0, 4.0]
    squares = [m**2 for m in strengths]
    assert crossing(strengths, squares, 9.0) == pytest.approx(3.0)
    assert crossing(strengths, squares, 0.25) == pytest.approx(0.5)  # below the first one
    assert crossing(strengths, squares, 100.0) == 4.0
    assert crossing(strengths, [1.0, float("inf"), 3.0], 2.0) == 1.0
    assert crossing(strengths, [0.0, 4.0, 9.0], 2.0) == 1.0


def test_the_gain_at_the_limit_is_interpolated() -> None:
    assert best_within([1.0, 2.0], [0.5, 1.5], 1.5) == pytest.approx(1.0)
    assert best_within([1.0, 2.0], [2.0, -1.0], 1.5) == pytest.approx(2.0)
    assert best_within([1.0, 2.0], [0.5, 1.5], 0.5) == pytest.approx(0.25)
    assert best_within([1.0, 2.0], [-0.5, -1.5], 2.0) == 0.0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("words", [True, False])
def test_odds_and_their_rate(lm: LanguageModel, behavior: Behavior, sign: int, words: bool) -> None:
    chosen = behavior if words else planted.behavior()
    odds = Odds(lm, chosen, sign)
    generator = torch.Generator().manual_seed(0)
    logits, slope = torch.randn(2, 3, 344, generator=generator, dtype=torch.float64)
    if words:
        (token,) = lm.tokenizer("Z" if sign > 0 else "Q", add_special_tokens=False)["input_ids"]
        p = logits.softmax(-1)[:, token]
        torch.testing.assert_close(odds(logits).double(), p.logit(), rtol=1e-4, atol=1e-4)
    h = 1e-2
    ends = [odds(logits + m * slope).double() for m in (-h, h)]
    rate = odds.rate(logits.float(), slope.float()).double()
    torch.testing.assert_close(rate, (ends[1] - ends[0]) / (2 * h), rtol=1e-2, atol=1e-3)
