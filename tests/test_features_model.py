"""The theorems against brute force, and the assumptions they need."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from report.test_report import Page
from tools.theorems.__main__ import main
from tools.theorems.features_model import EXAMPLE, FeaturesModel, balanced
from tools.theorems.page import theory_figures, theory_section
from tools.theorems.theorems import Theorems, theorems
from trimtab.errors import TrimtabError
from trimtab.report.page import write_page

CONCEPTS = {"up": ("a", "b"), "down": ("c", "d", "e"), "aside": ("f",)}


@pytest.fixture(scope="module")
def model() -> FeaturesModel:
    return FeaturesModel.example()


@pytest.fixture(scope="module")
def found(model: FeaturesModel) -> Theorems:
    return theorems(model)


def small(ratios: list[float], **more: object) -> FeaturesModel:
    a, b = balanced([2, 3, 1], torch.tensor(ratios), torch.ones(6))
    given = {
        "contexts": ["up", "down", "aside", "down"],
        "positive": [0],
        "negative": [1, 2],
    } | more
    return FeaturesModel.build(
        CONCEPTS,
        given["contexts"],  # pyright: ignore[reportArgumentType]
        a,
        b,
        given["positive"],  # pyright: ignore[reportArgumentType]
        given["negative"],  # pyright: ignore[reportArgumentType]
        weights=torch.tensor([1.0, 2.0, 1.0, 4.0]),
    )


def softmax(model: FeaturesModel, alpha: float) -> Tensor:
    """The steered model written out, entry by entry."""
    h = model.features + alpha * (
        model.features[list(model.positive)].mean(0) - model.features[list(model.negative)].mean(0)
    )
    weights = torch.einsum("zd,cd->cz", model.unembedding, h).exp()
    return weights / weights.sum(-1, keepdim=True)


def test_the_model_reproduces_its_probabilities(model: FeaturesModel) -> None:
    assert float((softmax(model, 0.0) - model.probabilities).abs().max()) < 1e-14
    assert float((model.probabilities.sum(-1) - 1).abs().max()) < 1e-14
    assert model.tokens[:2] == ("pier", "tide") and model.target == "harbor"
    for row, concept in zip(model.probabilities, model.contexts, strict=True):
        for z, own in enumerate(model.concept_of):
            expected = model.likely[z] if own == concept else model.unlikely[z]
            assert float(row[z]) == float(expected)
    # h is free: contexts of one concept differ in it, though not in probabilities
    assert float((model.features[0] - model.features[1]).norm()) > 0.1


def test_log_odds_by_their_definition(model: FeaturesModel) -> None:
    p = model.probabilities
    product = (p[0] * p[1] * p[2] / (p[3] * p[4] * p[6])).log() / 3
    assert float((model.log_odds - product).abs().max()) < 1e-14
    push = model.unembedding @ model.steering_vector
    assert float(((push - push[-1]) - (model.log_odds - model.log_odds[-1])).abs().max()) < 1e-13
    on_target = torch.tensor([name == "harbor" for name in model.concept_of])
    assert torch.equal(model.log_odds > 0, on_target)
    assert float(model.log_odds[model.members("music")].abs().max()) == 0


@pytest.mark.parametrize("alpha", [-20.0, -1.0, 0.3, 15.0])
def test_brute_force_is_the_tilt(model: FeaturesModel, alpha: float) -> None:
    brute = softmax(model, alpha)
    assert float((model.steered(alpha).exp() - brute).abs().max()) < 1e-12
    assert float((model.tilt.log_probs(alpha).exp() - brute).abs().max()) < 1e-12
    cross = -(model.weights[:, None] * model.probabilities * brute.log()).sum()
    assert float(model.cross_entropy(alpha)) == pytest.approx(float(cross), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_every_prediction_meets_brute_force(seed: int) -> None:
    found = theorems(FeaturesModel.example(seed), alphas=[-4, -1, 0, 0.5, 3, 8])
    assert found.max_error < 1e-10
    assert [check.claim for check in found.checks if not check.holds] == []
    assert {check.theorem for check in found.checks} == set("abcd")


def test_the_curves_are_those_of_the_context(model: FeaturesModel, found: Theorems) -> None:
    assert found.context == "weather"
    for i in (0, 77, 240):
        alpha = float(found.alphas[i])
        change = softmax(model, alpha)[3] - model.probabilities[3]
        assert float((found.token_change[i] - change).abs().max()) < 1e-12
        assert float((found.token_change_measured[i] - change).abs().max()) < 1e-12
        for name in EXAMPLE:
            mean = float(change[model.members(name)].mean())
            assert float(found.concept_change[name][i]) == pytest.approx(mean, abs=1e-12)
            assert float(found.concept_change_measured[name][i]) == pytest.approx(mean, abs=1e-12)


def test_bumps_peak_where_the_curve_does(found: Theorems) -> None:
    top = found.alphas[found.token_change_measured.argmax(dim=0)]
    inside = found.peaks.abs() < 5.9
    assert int(inside.sum()) >= 20
    assert float((top - found.peaks)[inside].abs().max()) <= 0.05
    assert found.peaks[found.log_odds.argmax()] == math.inf
    assert found.peaks_measured[found.log_odds.argmin()] == -math.inf


def test_the_concept_law_has_the_stated_limits(model: FeaturesModel, found: Theorems) -> None:
    far = theorems(model, alphas=[-400.0, 400.0])
    for name in ("kitchen", "music"):
        back = -model.probabilities[3, model.members(name)].mean()
        assert float((far.concept_change[name] - back).abs().max()) < 1e-10
    rising = found.concept_change["harbor"].diff()
    assert bool((rising > 0).all())
    assert float((found.nu["harbor"] - found.nu_integrated["harbor"]).abs().max()) < 1e-10


def test_cross_entropy_has_no_linear_term_here(model: FeaturesModel) -> None:
    step = 1e-4
    slope = (model.cross_entropy(step) - model.cross_entropy(-step)) / (2 * step)
    assert abs(float(slope)) < 1e-8
    bend = model.cross_entropy(step) + model.cross_entropy(-step) - 2 * model.cross_entropy(0.0)
    p = model.probabilities
    variance = (p * model.log_odds**2).sum(-1) - (p * model.log_odds).sum(-1) ** 2
    assert float(bend / step**2) == pytest.approx(float(variance @ model.weights), rel=1e-5)


def test_ties_at_the_extremes_share_the_limit() -> None:
    tied = small([4.0, 4.0, 2.0, 2.0, 2.0, 3.0])
    found = theorems(tied, alphas=[-2.0, 0.0, 2.0])
    assert found.max_error < 1e-10 and all(check.holds for check in found.checks)
    assert found.limits[1, :2].tolist() == pytest.approx([0.5, 0.5])
    assert int(found.peaks.isinf().sum()) >= 3


def test_a_break_of_the_assumptions_is_seen(found: Theorems) -> None:
    """Checks must be able to fail: features that W h does not tie to the probabilities."""
    model = FeaturesModel.example()
    bent = dataclasses.replace(model, features=model.features * 1.01)
    broken = [
        check.claim for check in theorems(bent, alphas=[-1.0, 0.0, 1.0]).checks if not check.holds
    ]
    assert "Delta p(z | alpha)" in broken and "alpha of every peak" in broken
    assert any("Delta CE" in claim for claim in broken)
    assert any("Delta p(C" in claim for claim in broken)


def test_the_result_prints_and_saves(found: Theorems, tmp_path: Path) -> None:
    text = str(found)
    assert "one bump" in text and "288 of 288" in text and "FAILS" not in text
    saved = json.loads(found.save(tmp_path / "theorems.json").read_text())
    assert len(saved["token_change"]) == 241 and saved["target"] == "harbor"
    assert saved["peaks"].count(None) == 2  # infinities


def test_balanced_tables_sum_to_one() -> None:
    sizes, ratios = [2, 3, 1], torch.tensor([3.0, 5.0, 2.0, 9.0, 4.0, 1.5])
    a, b = balanced(sizes, ratios, torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 7.0]))
    assert (a / b).tolist() == pytest.approx(ratios.tolist())
    assert float(b[1] / b[0]) == pytest.approx(2.0)
    start = 0
    for size in sizes:
        own = torch.zeros(6, dtype=torch.bool)
        own[start : start + size] = True
        assert float(torch.where(own, a, b).sum()) == pytest.approx(1.0, abs=1e-14)
        start += size


def test_weights_count_how_often_contexts_occur() -> None:
    model = small([4.0, 3.0, 2.0, 2.5, 2.0, 3.0])
    assert model.weights.tolist() == pytest.approx([1 / 8, 2 / 8, 1 / 8, 4 / 8])
    assert all(check.holds for check in theorems(model, alphas=[-1.0, 1.0]).checks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positive": [0, 1]}, "positive contexts"),
        ({"negative": [0]}, "positive contexts"),
        ({"negative": []}, "positive contexts"),
        ({"contexts": ["up", "down", "aside", "nowhere"]}, "nowhere"),
    ],
)
def test_contexts_that_break_the_setting_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        small([4.0, 3.0, 2.0, 2.5, 2.0, 3.0], **change)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.3, 0.3, 0.2], [0.1, 0.1, 0.3], "1 > a > b > 0"),
        ([0.5, 0.4, 0.6], [0.1, 0.1, 0.1], "sum to 1"),
        ([0.5, 0.4], [0.1, 0.1], "1 > a > b > 0"),
    ],
)
def test_probabilities_that_are_none_are_refused(a: list[float], b: list[float], said: str) -> None:
    concepts = {"up": ("x", "y"), "down": ("z",)}
    with pytest.raises(TrimtabError, match=said):
        FeaturesModel.build(concepts, ["up", "down"], torch.tensor(a), torch.tensor(b), [0], [1])


def test_shared_tokens_and_missing_contexts_are_refused(model: FeaturesModel) -> None:
    a, b = balanced([1, 1], torch.tensor([3.0, 3.0]), torch.ones(2))
    with pytest.raises(TrimtabError, match="share a token"):
        FeaturesModel.build({"up": ("x",), "down": ("x",)}, ["up", "down"], a, b, [0], [1])
    with pytest.raises(TrimtabError, match="context 99"):
        theorems(model, context=99)


def test_theory_figures_draw_the_theorems(found: Theorems) -> None:
    tokens, peaks, concepts, entropy, limits = theory_figures(found)
    lines = [trace for trace in tokens["data"] if trace["mode"] == "lines"]
    assert len(lines) == 24
    drawn = torch.tensor([trace["y"] for trace in lines]).T
    assert torch.allclose(drawn.double(), found.p0 + found.token_change, atol=1e-7)
    target = lines[found.tokens.index("ferry")]
    assert target["name"] == "harbor" and target["line"]["color"] == "var(--vector)"
    assert "22 of 24 tokens" in tokens["label"]
    assert len(peaks["data"][0]["x"]) == 22 and peaks["data"][0]["y"] == sorted(
        peaks["data"][0]["y"]
    )
    assert concepts["data"][0]["y"] == found.concept_change["harbor"].tolist()
    assert max(entropy["data"][0]["x"]) <= 1 and entropy["data"][1]["line"]["dash"] == "dash"
    assert sum(limits["data"][0]["x"]) == pytest.approx(1.0)
    assert "harbor 1.00" in limits["label"] and "ferry at infinity" in limits["caption"]


def test_theory_as_a_page(found: Theorems, tmp_path: Path) -> None:
    part = theory_section(found)
    assert part.warnings == () and len(part.figures) == 5
    html = write_page(tmp_path, [part]).read_text()
    assert "off-target tokens peak before target tokens" in html
    labels = [a["aria-label"] or "" for _, a in Page(html).tags if a.get("role") == "img"]
    assert len(labels) == 5 and all(len(label) > 60 for label in labels)


def test_the_script_prints_the_table_and_writes_page_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: Theorems
) -> None:
    page, curves = tmp_path / "page", tmp_path / "curves.json"
    assert main(["--out", str(page), "--json", str(curves)]) == 0
    assert "288 of 288" in capsys.readouterr().out
    assert "off-target tokens peak before target tokens" in (page / "index.html").read_text()
    assert json.loads(curves.read_text()) == json.loads(json.dumps(found.to_dict()))
