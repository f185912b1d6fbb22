"""The gap by every aggregator and unit, its census, and its gradient, against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import planted
import tiny
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import AGGREGATORS, ReadoutTokens, gap, gap_of, readout_tokens
from trimtab.margins.census import count_first_tokens
from trimtab.margins.gap import read, report_gaps
from trimtab.margins.radius import gap_gradients, report_radius
from trimtab.models.model import LanguageModel
from trimtab.results.quantiles import median_interval, quantiles
from trimtab.steering.vector import VectorSteering

PROMPTS = ["How do I find the pier?", "Why?", "Please talk only about cats and the ferry."]
WORDS = {"toward": ["Z", "Kite"], "away": ["Q"]}
BEHAVIOR = planted.behavior(readout=WORDS)


def by_hand(probabilities: torch.Tensor, tokens: ReadoutTokens, aggregator: str) -> torch.Tensor:
    toward, away = (probabilities[:, list(ids)] for ids in (tokens.toward, tokens.away))
    if aggregator == "max":
        return toward.amax(1).log() - away.amax(1).log()
    t, a = toward.sum(1), away.sum(1)
    if aggregator == "logsumexp":
        return (t / a).log()
    return (t / (1 - t)).log() - (a / (1 - a)).log()


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_aggregators_against_probabilities(llama: LanguageModel, aggregator: str) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    expected = by_hand(llama.next_logits(PROMPTS).double().softmax(-1), tokens, aggregator)
    found = gap(llama, BEHAVIOR, PROMPTS, aggregator)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    readings = read(llama, tokens, [llama.encode(p) for p in PROMPTS])
    torch.testing.assert_close(readings.gaps[aggregator], expected, rtol=1e-4, atol=1e-4)


def test_log_odds_crosses_zero_with_logsumexp_and_saturates_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = ReadoutTokens((0, 1), (2,), (), {})
    logits = torch.randn(200, 9, generator=generator, dtype=torch.float64) * 3
    odds, plain = gap_of(logits, tokens, "log_odds"), gap_of(logits, tokens)
    assert torch.equal(odds > 0, plain > 0) and bool((odds.abs() >= plain.abs()).all())
    certain = torch.full((1, 9), -50.0)
    certain[0, 0] = 50.0  # p(toward) rounds to 1 in float32
    assert float(gap_of(certain, tokens, "log_odds")) == pytest.approx(200.0, abs=3.0)
    with pytest.raises(TrimtabError, match="logsumexp, max, log_odds"):
        gap_of(logits, tokens, "mean")


def test_values_are_in_the_caller_s_order_and_units(llama: LanguageModel) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    readings = read(llama, tokens, [llama.encode(p) for p in PROMPTS])
    report = report_gaps(llama, {"toward": readings}, tokens, "opening", "max")
    side = report.sides["toward"]
    logits = llama.next_logits(PROMPTS).double()
    expected = [float(gap(llama, BEHAVIOR, [p], "max")) for p in PROMPTS]
    assert side.values["max"] == pytest.approx(expected, abs=1e-4)
    spread = logits.std(-1, correction=0)
    assert side.values["standard"] == pytest.approx((torch.tensor(expected) / spread).tolist())
    assert side.gap.median == pytest.approx(float(np.median(expected)), abs=1e-4)
    assert side.positive == sum(value > 0 for value in expected) / 3
    assert set(side.aggregators) == set(AGGREGATORS) and report.soft_cap is side.pre_cap is None


def test_the_sign_has_both_names(llama: LanguageModel) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    readings = read(llama, tokens, [llama.encode("Why?")])
    report = report_gaps(llama, {"toward": readings}, tokens, "opening")
    assert report.sign.startswith("gap = toward - away. Positive: the answer opens as opening does")
    assert "D0 = refusal - affirmation is the negative of the compliance gap" in report.sign
    assert "'Z'" in report.sign.split(";")[0] and "'Q'" in report.sign.split(";")[1]
    assert "D0" in str(report)


def test_a_soft_cap_is_looked_behind() -> None:
    settings = tiny.config("gemma2")
    settings.final_logit_softcapping = 1.5
    lm = tiny.language_model(settings)
    tokens = readout_tokens(lm, BEHAVIOR)
    readings = read(lm, tokens, [lm.encode(p) for p in PROMPTS])
    report = report_gaps(lm, {"away": readings}, tokens, "opening")
    cap = report.soft_cap
    assert cap is not None and cap == 1.5
    inside = cap * torch.atanh(lm.next_logits(PROMPTS).double() / cap)
    found = torch.tensor(report.sides["away"].values["pre_cap"], dtype=torch.float64)
    torch.testing.assert_close(found, gap_of(inside, tokens), rtol=1e-3, atol=1e-3)
    capped = torch.tensor(report.sides["away"].values["logsumexp"], dtype=torch.float64)
    assert float((found - capped).abs().max()) > 0.1
    assert report.units_table().columns[-1] == "logsumexp before the cap"


def test_census_counts_every_first_token(llama: LanguageModel) -> None:
    tokens = ReadoutTokens((5, 6), (7,), (), {5: "a", 6: "b", 7: "c"})
    greedy = {"toward": torch.tensor([5, 6, 6, 7, 20, 21, 20]), "away": torch.tensor([7, 7])}
    census = count_first_tokens(llama, greedy, tokens)
    toward = census.sides["toward"]
    assert [s.count for s in (toward.toward, toward.away, toward.neither)] == [3, 1, 3]
    assert toward.others == ((llama.tokenizer.decode([20]), 2), (llama.tokenizer.decode([21]), 1))
    assert toward.toward.low < 3 / 7 == toward.toward.share < toward.toward.high
    away = census.sides["away"]
    assert away.away.share == 1.0 and away.away.low == pytest.approx(0.025**0.5)  # Clopper-Pearson


def test_quantiles_take_infinities_and_enclose_the_median() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(31, generator=generator, dtype=torch.float64)
    found = quantiles(values)
    expected = np.quantile(values.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert [found.p5, found.p25, found.median, found.p75, found.p95] == pytest.approx(expected)
    assert found.low < found.mean < found.high
    hits = 0
    for _ in range(200):
        low, high = median_interval(torch.randn(15, generator=generator).sort().values)
        hits += low <= 0 <= high
    assert hits / 200 > 0.93
    some = quantiles(torch.tensor([1.0, 2.0, math.inf, math.inf, math.inf]))
    assert some.median == math.inf and some.p25 == 2.0 and math.isnan(some.mean)
    assert math.isnan(quantiles(torch.tensor([])).median)


def push(lm: LanguageModel, layer: int, unit: torch.Tensor, length: float) -> VectorSteering:
    return VectorSteering.from_directions(lm, {layer: unit}, alpha=length, scope="last")


def test_gradients_against_differences(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, BEHAVIOR)
    found = gap_gradients(lm, tokens, [lm.encode(p) for p in PROMPTS])
    assert found.grad.shape == (3, lm.n_layers, lm.d_model)
    for layer in (0, lm.n_layers - 1):
        for row, prompt in enumerate(PROMPTS):
            slope = float(found.grad[row, layer].norm())
            unit, step = found.grad[row, layer] / slope, 2e-3 * float(found.norm[row, layer])
            ends = []
            for length in (step, -step):
                with push(lm, layer, unit, length).on(lm):
                    ends.append(float(gap(lm, BEHAVIOR, [prompt])))
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_gradients_do_not_depend_on_the_batch_and_leave_no_trace(llama: LanguageModel) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    encoded = [llama.encode(p) for p in PROMPTS]
    flags = [p.requires_grad for p in llama.model.parameters()]
    llama.model(torch.tensor([encoded[0].ids]), output_hidden_states=True)  # hooks of the library
    hooks = [len(m._forward_hooks) for m in llama.model.modules()]
    together = gap_gradients(llama, tokens, encoded, "max")
    for row, one in enumerate(encoded):
        alone = gap_gradients(llama, tokens, [one], "max")
        torch.testing.assert_close(together.grad[row], alone.grad[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together.norm[row], alone.norm[0], rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in llama.model.parameters()] == flags
    assert all(p.grad is None for p in llama.model.parameters())
    assert [len(m._forward_hooks) for m in llama.model.modules()] == hooks


def test_the_radius_is_free_of_the_logits_scale() -> None:
    lm = planted.language_model()
    tokens, encoded = readout_tokens(lm, BEHAVIOR), [lm.encode(p) for p in PROMPTS]
    before = gap_gradients(lm, tokens, encoded, "max")
    with torch.no_grad():
        lm.model.get_parameter("lm_head.weight").mul_(3.0)
    after = gap_gradients(lm, tokens, encoded, "max")
    torch.testing.assert_close(after.gap, 3 * before.gap, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.radius, before.radius, rtol=1e-3, atol=1e-4)
    report = report_radius({"toward": after})
    assert len(report.sides["toward"]) == lm.n_layers
    expected = (after.radius[:, 2] / after.norm[:, 2]).median()
    assert report.sides["toward"][2].relative.median == pytest.approx(float(expected))
