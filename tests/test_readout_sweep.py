"""readout_sweep(): gap, target probability and KL against the plain loop, strength by strength."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
import tiny
from test_fan import lever
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap, readout_tokens
from trimtab.models.model import LanguageModel
from trimtab.strength.readout_sweep import readout_sweep

STRENGTHS = [1.0, -0.5, 0.0, 0.2]
READOUT = {"toward": ["Sure", "Yes"], "away": ["No", "Sorry"]}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


@pytest.mark.parametrize("scope", ["all", "last", "post_instruction"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_every_figure_matches_the_plain_loop(architecture: str, scope: str) -> None:
    lm = tiny.language_model(architecture)
    behavior, vector = planted.behavior(readout=READOUT), lever(lm, [1], scope)
    result = readout_sweep(lm, behavior, vector, STRENGTHS)
    prompts = [example.prompt for example in behavior.away]
    tokens = readout_tokens(lm, behavior)
    before = torch.log_softmax(lm.next_logits(prompts).double(), -1)
    assert result.gaps is not None and result.probabilities is not None
    assert result.gaps.shape == result.kl.shape == (4, 8)
    for i, strength in enumerate(STRENGTHS):
        with vector.at(strength).on(lm):
            gaps = gap(lm, behavior, prompts)
            after = torch.log_softmax(lm.next_logits(prompts).double(), -1)
        mass = after[:, list(tokens.toward)].exp().sum(-1)
        kl = (before.exp() * (before - after)).sum(-1)
        torch.testing.assert_close(result.gaps[i], gaps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.probabilities[i].double(), mass, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(result.kl[i], kl, rtol=1e-3, atol=1e-6)
        row = result.rows[i]
        assert row.strength == strength
        assert row.gap == pytest.approx(float(gaps.mean()), abs=1e-4)
        assert row.probability == pytest.approx(float(mass.mean()), rel=1e-3)
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert row.kl_p95 == pytest.approx(float(kl.quantile(0.95)), rel=1e-3, abs=1e-6)
    assert result.rows[2].kl == result.rows[2].kl_p95 == 0.0 < result.rows[3].kl
    assert "once for all strengths" in result.plan


def test_prompts_follow_the_sign_and_can_be_given(lm: LanguageModel) -> None:
    behavior, vector = planted.behavior(readout=READOUT), planted.push(lm, "last")

    def first(**more: Any) -> torch.Tensor:
        found = readout_sweep(lm, behavior, vector, [0.0], **more).gaps
        assert found is not None
        return found[0]

    sides = {
        1: [example.prompt for example in behavior.away],
        -1: [example.prompt for example in behavior.toward],
    }
    for sign, prompts in sides.items():
        want = gap(lm, behavior, prompts)
        torch.testing.assert_close(first(sign=sign), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first(prompts=prompts[3:]), want[3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first(sign=sign, max_prompts=2), want[:2], rtol=1e-4, atol=1e-4)
    asked = planted.behavior(readout=READOUT, requests=["Tell me about the boat."])
    assert readout_sweep(lm, asked, vector, [1.0], sign=-1).kl.shape == (1, 1)


def test_without_readout_words_the_divergence_stays(lm: LanguageModel, tmp_path: Path) -> None:
    vector = planted.push(lm, "last")
    seen: list[tuple[int, int]] = []
    result = readout_sweep(
        lm,
        planted.behavior(),
        vector,
        [-1.0, 0.5],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.gaps is None and result.probabilities is None
    assert result.rows[0].gap is None and result.rows[0].kl > result.rows[1].kl > 0
    assert seen[-1] == (16, 16)
    text = str(result)
    assert "–" in text and "-1" in text and "8 prompts" in text
    saved = json.loads(result.save(tmp_path / "r.json").read_text())
    assert len(saved["kl"]) == 2 and len(saved["kl"][0]) == 8 and saved["gaps"] is None


def test_nothing_to_read_is_refused(lm: LanguageModel) -> None:
    vector = planted.push(lm)
    with pytest.raises(TrimtabError, match="finite"):
        readout_sweep(lm, planted.behavior(), vector, [])
    empty: list[dict[str, Any]] = [{"prompts": []}, {"max_prompts": 0}]
    for more in empty:
        with pytest.raises(TrimtabError, match="no prompts"):
            readout_sweep(lm, planted.behavior(), vector, [1.0], **more)
