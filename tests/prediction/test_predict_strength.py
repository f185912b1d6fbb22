"""predict_strength(): what one derivative predicts is what the model does, where the law is to be trusted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
import tiny
from conftest import tiny_model
from trimtab.arguments import Side
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.readout import gap
from trimtab.models.model import LanguageModel
from trimtab.passes.decisions import answer_variance, decisions
from trimtab.prediction.predict import (
    StrengthPrediction,
    curvature,
    gap_slope,
    predict_strength,
    quartiles,
)
from trimtab.steering.vector import VectorSteering

WORDS = {"toward": ["Z"], "away": ["Q"]}
TOKENS = planted.TOKENS
DIRECTIONS: dict[int, Side] = {1: "toward", -1: "away"}
DENSE = [name for name in tiny.ARCHITECTURES if name != "mixtral"]  # experts switch in jumps


def push(lm: LanguageModel, layers: tuple[int, ...] = (1, 2), **more: Any) -> VectorSteering:
    directions = {
        k: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(k)) for k in layers
    }
    return VectorSteering.from_directions(lm, directions, **more)


def predict(
    lm: LanguageModel, vector: VectorSteering | None = None, **more: Any
) -> StrengthPrediction:
    behavior = planted.behavior(readout=WORDS)
    chosen = push(lm) if vector is None else vector
    return predict_strength(lm, behavior, chosen, **{"max_new_tokens": TOKENS, **more})


def prompts() -> list[str]:
    return [str(example.prompt) for example in planted.behavior().away]


@torch.no_grad()
def measured(lm: LanguageModel, vector: VectorSteering, m: float) -> torch.Tensor:
    """KL(p0 || p_m) at the first answer position of every prompt."""
    own = lm.next_logits(prompts()).double().log_softmax(-1)
    with vector.at(m).on(lm):
        q = lm.next_logits(prompts()).double().log_softmax(-1)
    return (own.exp() * (own - q)).sum(-1)


@pytest.mark.parametrize("architecture", DENSE)
def test_damage_at_alpha_kappa_is_the_budget(architecture: str) -> None:
    lm, nats = tiny_model(architecture), 1e-3
    vector = push(lm)
    (budget,) = predict(lm, vector, budgets=(nats,)).budgets
    evaluator = Evaluator(lm, planted.behavior(), max_new_tokens=TOKENS)
    reference = Reference(lm, evaluator.prompts("toward"), evaluator.unsteered("toward"))
    # The mean of both sides, in which the cubic term cancels.
    both = [summarize(reference.kl(vector.at(s * budget.damage))).mean for s in (1, -1)]
    assert sum(both) / 2 == pytest.approx(nats, rel=0.03)
    assert max(abs(kl / nats - 1) for kl in both) < 0.13
    reached = decisions(lm, vector, prompts()).tilt.strength_for_kl(nats)
    expected = [float(reached.quantile(q)) for q in (0.25, 0.5, 0.75)]
    assert [budget.low, budget.decision, budget.high] == pytest.approx(expected)


@pytest.mark.parametrize("architecture", DENSE)
def test_kl_grows_with_the_square_of_the_strength(architecture: str) -> None:
    lm = tiny_model(architecture)
    vector = push(lm)
    m = float(decisions(lm, vector, prompts()).tilt.strength_for_kl(4e-4).median())
    rise = (measured(lm, vector, m) / measured(lm, vector, m / 2)).log2()
    assert float(rise.median()) == pytest.approx(2.0, abs=0.1)


def test_the_last_layer_of_experts_obeys_as_well() -> None:
    lm = tiny_model("mixtral")
    vector = push(lm, (3,))
    found = predict(lm, vector, budgets=(1e-3,))
    tilt = decisions(lm, vector, prompts()).tilt
    m = found.budgets[0].decision
    torch.testing.assert_close(measured(lm, vector, m), tilt.kl(m), rtol=0.1, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "olmo2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("sign", [1, -1])
def test_kl_at_the_trusted_strength_is_near_the_law(architecture: str, sign: int) -> None:
    lm = tiny_model(architecture)
    vector = push(lm)
    found = predict(lm, vector, direction=DIRECTIONS[sign])
    assert 0 < found.trusted < math.inf
    tilt = decisions(lm, vector, prompts()).tilt
    ratio = measured(lm, vector, sign * found.trusted) / tilt.kl(sign * found.trusted)
    assert 0.83 <= float(ratio.median()) <= 1.17
    # It is an edge: further out the law is off by more than it tolerates.
    strengths = [sign * factor * found.trusted for factor in (1.5, 2, 3, 4, 6)]
    beyond = [(measured(lm, vector, m) / tilt.kl(m)).median() for m in strengths]
    assert max(abs(float(ratio) - 1) for ratio in beyond) > 0.15


def test_what_never_bends_is_trusted_up_to_one_nat(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    norm: Any = lm.sites.final_norm
    monkeypatch.setattr(norm, "forward", lambda x: 0.2 * x)  # the last layer is linear now
    vector = push(lm, (3,))
    tilt = decisions(lm, vector, prompts()).tilt
    expected = float(tilt.strength_for_kl(1.0).median())
    assert predict(lm, vector).trusted == pytest.approx(expected, rel=1e-6)


def test_windows_and_reach_are_those_of_the_tilt(llama: LanguageModel) -> None:
    vector = planted.push(llama, scope="all")
    for sign, word in ((1, "Z"), (-1, "Q")):
        found = predict(llama, vector, direction=DIRECTIONS[sign])
        evaluator = Evaluator(llama, planted.behavior())
        tilt = decisions(llama, vector, evaluator.prompts(evaluator.scored(sign))).tilt
        (token,) = llama.tokenizer(word, add_special_tokens=False)["input_ids"]
        steepest = (tilt.collapse_token(sign) == token).double()
        assert found.collapse[0][0] == word and found.reach == float(steepest.mean()) > 0.5
        assert len(found.windows) == found.prompts == 8
        for i, (low, high) in enumerate(found.windows):
            assert float(tilt.kl(sign * high)[i]) == pytest.approx(0.5, abs=1e-6)
            if low is None:
                assert not steepest[i]
                continue
            there = tilt.concept_probability([token], sign * low)[i]
            assert low > 0 and float(there) == pytest.approx(0.5, abs=1e-6)


def test_what_the_law_never_reaches_has_no_lower_end(llama: LanguageModel) -> None:
    found = predict(llama, push(llama, (3,)))
    assert found.reach == 0.0 and {low for low, _ in found.windows} == {None}
    assert "0 of 8 prompts, in half of those by m = nowhere" in " ".join(found.table().notes)


def test_the_gap_moves_by_its_slope(llama: LanguageModel) -> None:
    behavior, h = planted.behavior(readout=WORDS), 1e-3
    vector = push(llama)
    for sign, side in ((1, behavior.away), (-1, behavior.toward)):
        listed, ends = [example.prompt for example in side], []
        for m in (-h, h):
            with vector.at(m).on(llama):
                ends.append(float(gap(llama, behavior, listed).mean()))
        expected = sign * (ends[1] - ends[0]) / (2 * h)
        assert predict(llama, vector, direction=DIRECTIONS[sign]).gap_slope == pytest.approx(expected, rel=0.02)


def test_gap_slope_weighs_tokens_by_probability() -> None:
    class Two:
        log_p0 = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).double().log()
        slope = torch.tensor([[3.0, 0.0, 1.0, 6.0]]).double()

    tilt: Any = Two()
    assert gap_slope(tilt, [0, 1], [2, 3]) == pytest.approx(2.0 - 2.0)
    assert gap_slope(tilt, [0], [1, 2]) == pytest.approx(3.0 - 0.2 / 0.45)


def test_variance_along_answers_is_that_of_every_token(llama: LanguageModel) -> None:
    vector = push(llama)
    answers = ["Sure", "here is how it works", ""]
    found = answer_variance(llama, vector, prompts()[:3], answers)
    reference = Reference(llama, prompts()[:3], answers)
    m = 1e-2
    for variance, kl in zip(found, reference.kl(vector.at(m)), strict=True):
        assert variance.shape == kl.shape
        torch.testing.assert_close(m**2 / 2 * variance, kl, rtol=0.1, atol=1e-7)


def test_an_answer_without_a_token_has_no_variance(plain: LanguageModel) -> None:
    plain.tokenizer.eos_token, before = None, plain.tokenizer.eos_token
    try:
        empty, full = answer_variance(plain, push(plain), prompts()[:2], ["", "Sure"])
    finally:
        plain.tokenizer.eos_token = before
    assert empty.shape == (0,) and full.numel() > 0


def test_curvature_is_the_second_difference(llama: LanguageModel) -> None:
    vector, h = push(llama), 0.02
    ends = []
    for m in (-h, 0.0, h):
        with vector.at(m).on(llama):
            ends.append(llama.next_logits(prompts()).double())
    expected = (ends[0] - 2 * ends[1] + ends[2]) / h**2
    bend = curvature(llama, vector, prompts(), h)
    assert (bend - expected).abs().max() <= 0.02 * expected.abs().max()


def test_the_cumulative_push_at_the_last_layer_is_its_share(llama: LanguageModel) -> None:
    vector = push(llama, (3,))
    found = decisions(llama, vector, prompts())
    expected = vector.scales[3] / found.stream.norm(dim=-1)
    assert predict(llama, vector).cumulative == pytest.approx(float(expected.mean()), rel=1e-4)


def test_a_behavior_without_readout_words_works(llama: LanguageModel) -> None:
    found = predict_strength(llama, planted.behavior(), push(llama), max_new_tokens=TOKENS)
    assert (found.gap_slope, found.reach, found.windows) == (None, None, ())
    assert "readout" not in str(found)


def test_it_prints_and_saves(llama: LanguageModel, tmp_path: Path) -> None:
    found = predict(llama, direction="away")
    table = found.table()
    assert len(table.rows) == 3 and "away" in table.title and "layers 1, 2" in table.title
    assert str(found) and found._repr_html_()
    kept = json.loads(found.save(tmp_path / "laws.json").read_text())
    assert kept["sign"] == -1 and kept["method"] == "jvp" and kept["scope"] == "all"
    assert [b["nats"] for b in kept["budgets"]] == [0.01, 0.1, 0.5]
    assert kept["trusted"] == found.trusted and len(kept["windows"]) == 8


def test_one_prompt_is_enough(llama: LanguageModel) -> None:
    found = predict(llama, max_prompts=1)
    assert found.prompts == 1 and len(found.windows) == 1
    assert found.budgets[0].low == found.budgets[0].high


def test_what_moves_nothing_gives_infinite_strengths(llama: LanguageModel) -> None:
    found = predict(llama, push(llama, scope="generated"))
    assert {b.decision for b in found.budgets} == {math.inf} and found.trusted == 0.0
    assert {b.low for b in found.budgets} == {math.inf}
    assert all(math.isfinite(b.damage) for b in found.budgets)  # answers do move
    assert str(found)


def test_prompts_that_do_not_move_are_left_out_of_the_radius(llama: LanguageModel) -> None:
    behavior = planted.behavior(away=["Hi", *prompts()[:4]])
    longest = len(llama.encode("Hi").ids)
    window = push(llama, scope=f"[{longest},{longest + 40})")
    found = predict_strength(llama, behavior, window, max_new_tokens=TOKENS)
    assert found.prompts == 5 and 0 < found.trusted < math.inf
    assert math.isinf(found.budgets[0].high) or math.isfinite(found.budgets[0].decision)


def test_quartiles_allow_infinities() -> None:
    assert quartiles(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()) == (2.0, 3.0, 4.0)
    inf = math.inf
    assert quartiles(torch.tensor([inf, inf]).double()) == (inf, inf, inf)
    assert quartiles(torch.tensor([1.0, 2.0, inf, 0.0, inf]).double()) == (1.0, 2.0, inf)
    assert all(map(math.isnan, quartiles(torch.empty(0).double())))


@pytest.mark.parametrize("budgets", [(), (0.0,), (-1.0, 0.5), (math.nan,), (math.inf,)])
def test_budgets_that_are_none_are_refused(
    llama: LanguageModel, budgets: tuple[float, ...]
) -> None:
    with pytest.raises(TrimtabError, match="budgets"):
        predict(llama, budgets=budgets)


def test_no_prompts_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no prompts"):
        decisions(llama, push(llama), [])
