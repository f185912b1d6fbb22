"""check_laws(): the prediction that is exact is found exact, and where laws fail it shows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from conftest import tiny_model
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import decisions
from trimtab.prediction.law_check import PREDICTIONS, LawCheck, check_laws
from trimtab.steering.vector import VectorSteering

PROMPTS = [str(example.prompt) for example in planted.behavior().away][:4]
BUDGETS = (0.01, 0.1, 0.5)


def push(lm: LanguageModel, layers: Sequence[int] = (3,), **more: Any) -> VectorSteering:
    directions = {
        k: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(k)) for k in layers
    }
    return VectorSteering.from_directions(lm, directions, **more)


def check(lm: LanguageModel, vector: VectorSteering, **more: Any) -> LawCheck:
    return check_laws(lm, vector, more.pop("prompts", PROMPTS), points=7, **more)


@pytest.fixture(scope="module")
def early(llama: LanguageModel) -> LawCheck:
    return check(llama, push(llama, (1, 2)))


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "gpt2", "gpt_neox", "mixtral"])
def test_at_the_last_layer_the_norm_law_is_exact(architecture: str) -> None:
    lm = tiny_model(architecture)
    found = check(lm, push(lm), sign=-1 if architecture == "gpt2" else 1)
    assert found.last_layer
    for nats in BUDGETS:
        row = found.budget("norm", nats)
        assert (row.low, row.ratio, row.high) == pytest.approx((1, 1, 1), abs=0.02), nats
    assert found.collapse_right == 1.0 and found.collapse is not None
    assert found.exponent == pytest.approx(2.0, abs=0.1)
    assert found.peaks > 0.8 and found.peaks_inside > 0.6
    for point in found.curve:
        assert point.predicted["norm"] == pytest.approx(point.kl, rel=0.02)


def test_a_budget_that_the_plateau_never_reaches_is_left_out(llama: LanguageModel) -> None:
    found = check(llama, push(llama), budgets=(0.1, 1e4))
    assert found.budget("norm", 0.1).ratio == pytest.approx(1.0, abs=0.02)
    beyond = found.budget("norm", 1e4)
    assert math.isinf(beyond.strength) and math.isnan(beyond.ratio)
    assert math.isfinite(found.budget("quadratic", 1e4).ratio)


def test_deep_in_the_network_small_budgets_hold_and_large_ones_do_not(early: LawCheck) -> None:
    assert not early.last_layer
    assert early.exponent == pytest.approx(2.0, abs=0.1)
    assert early.budget("quadratic", 0.01).ratio == pytest.approx(1.0, abs=0.3)
    errors = [abs(math.log(early.budget("tilt", nats).ratio)) for nats in BUDGETS]
    assert errors[-1] > errors[0]
    assert early.collapse_right == 1.0


def test_the_away_side_is_measured_on_its_side(llama: LanguageModel) -> None:
    vector = push(llama)
    both = {sign: check(llama, vector, sign=sign) for sign in (1, -1)}
    assert all(point.strength > 0 for point in both[1].curve)
    assert all(point.strength < 0 for point in both[-1].curve)
    assert both[1].collapse != both[-1].collapse
    opposite = VectorSteering.from_directions(llama, {3: -vector.directions[3] * vector.scales[3]})
    mirrored = check(llama, opposite)
    for mine, other in zip(both[-1].budgets, mirrored.budgets, strict=True):
        assert mine.ratio == pytest.approx(other.ratio, rel=1e-2, nan_ok=True)
    assert mirrored.collapse == both[-1].collapse


def test_every_prediction_has_every_budget(early: LawCheck) -> None:
    rows = [(b.prediction, b.nats) for b in early.budgets]
    assert rows == [(name, nats) for name in PREDICTIONS for nats in BUDGETS]
    assert all(b.low <= b.ratio <= b.high and b.strength > 0 for b in early.budgets)


def test_the_curve_rises_from_small_to_large(early: LawCheck) -> None:
    assert len(early.curve) == 7
    strengths = [point.strength for point in early.curve]
    assert strengths == sorted(strengths)
    first, last = early.curve[0], early.curve[-1]
    assert first.kl == pytest.approx(1e-3, rel=0.5) and last.kl > 100 * first.kl
    # The range is set by the tilt.
    assert first.predicted["tilt"] == pytest.approx(1e-3, rel=0.2)
    assert last.predicted["tilt"] == pytest.approx(2.0, rel=0.2)
    for point in early.curve:
        assert set(point.predicted) == set(PREDICTIONS)
        assert point.kl_low <= point.kl <= point.kl_high
        assert point.probability is None and point.probability_tilt is None


def test_wanted_tokens_give_probabilities(llama: LanguageModel) -> None:
    vector = planted.push(llama, scope="all")
    (token,) = llama.tokenizer("Z", add_special_tokens=False)["input_ids"]
    found = check(llama, vector, wanted=[token])
    mass = []
    for point in found.curve:
        with vector.at(point.strength).on(llama):
            own = llama.next_logits(PROMPTS).softmax(-1)[:, token].mean()
        assert point.probability == pytest.approx(float(own), rel=1e-3)
        assert point.probability_norm == pytest.approx(float(own), rel=1e-2)
        mass.append(point.probability)
    assert mass == sorted(mass)
    tilts = [point.probability_tilt or 0.0 for point in found.curve]
    assert 0 < tilts[0] and tilts == sorted(tilts) and found.collapse == "Z"


def test_one_bump_counts_tokens_that_rise_again(early: LawCheck, llama: LanguageModel) -> None:
    assert 0 < early.one_bump < check(llama, push(llama)).one_bump <= 1


def test_it_prints_and_saves(early: LawCheck, tmp_path: Path) -> None:
    table = early.table()
    assert len(table.rows) == 12 and "exponent" in table.notes[0]
    assert "collapses into" in table.notes[-1] and str(early)
    kept = json.loads(early.save(tmp_path / "check.json").read_text())
    assert len(kept["curve"]) == 7 and kept["layers"] == [1, 2]


def test_one_prompt_is_enough(llama: LanguageModel) -> None:
    found = check(llama, push(llama), prompts=PROMPTS[:1])
    assert found.prompts == 1 and found.budget("norm", 0.5).ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "more", [{"operation": "ablate", "alpha": 1.0}, {"site": "mlp_out"}, {"scope": "[0,9)"}]
)
def test_without_a_push_that_grows_there_is_no_collapse(
    llama: LanguageModel, more: dict[str, Any]
) -> None:
    found = check(llama, push(llama, (2,), **more))
    assert (found.collapse, found.collapse_right) == (None, None)
    assert "collapses" not in str(found)


def test_prompts_that_do_not_move_are_left_out(llama: LanguageModel) -> None:
    short = "Hi"
    start = len(llama.encode(short).ids)
    window = push(llama, (1,), scope=f"[{start},{start + 40})")
    found = check(llama, window, prompts=[short, *PROMPTS])
    assert found.prompts == len(PROMPTS)


def test_what_moves_nothing_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="scope generated moves"):
        check(llama, push(llama, scope="generated"))


def test_a_law_is_inverted_where_it_reaches_the_budget(llama: LanguageModel) -> None:
    vector = push(llama, (1, 2))
    found = check(llama, vector, sign=-1)
    tilt = decisions(llama, vector, PROMPTS).tilt
    for nats in BUDGETS:
        leading = (2 * nats / tilt.variance(0.0)).sqrt().median()
        assert found.budget("quadratic", nats).strength == pytest.approx(float(leading), rel=1e-6)
        exact = tilt.strength_for_kl(nats, -1).abs().median()
        assert found.budget("tilt", nats).strength == pytest.approx(float(exact), rel=2e-3)


def test_peaks_are_found_between_grid_points(llama: LanguageModel) -> None:
    """Many peaks are closer to each other than grid points, where their order would be chance."""
    found = check(llama, push(llama))
    assert found.peaks_inside > 0.83  # 0.80 by the grid points alone
