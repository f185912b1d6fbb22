"""The linearity radius: where a known curve departs, and that real pushes depart there."""

from __future__ import annotations

import json
import math

import pytest
import torch

import planted
import tiny
from tiny import forward_as
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import ReadoutTokens, readout_tokens
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import courses, moved_gaps, pulled_back
from trimtab.mechanism.geometry.linearity import LENGTHS, crossing, departure, linearity
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

BEHAVIOR = planted.behavior(readout={"toward": ["Z"], "away": ["Q"]})
TEXTS = ["Where is the ferry?", "How do I find the ledger at noon?", "Please, the boat"]


def vector(lm: LanguageModel) -> VectorSteering:
    generator = torch.Generator().manual_seed(3)
    drawn = {k: torch.randn(lm.d_model, generator=generator) for k in range(lm.n_layers)}
    return VectorSteering.from_directions(lm, drawn)


def case(lm: LanguageModel) -> Case:
    return Case(lm, BEHAVIOR, vector(lm))


def test_crossing_of_known_curves() -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    slope, bend = 2.0, torch.tensor([0.05, 0.4, 100.0, 0.0])
    # gap(t) = slope t + bend t^2 departs by bend t / slope: 10 % at 0.1 slope / bend.
    change = slope * lengths[:, None] + bend * lengths[:, None] ** 2
    found = crossing(LENGTHS, departure(change, slope * lengths[:, None].expand(-1, 4)))
    expected = [4.0, 0.5, 0.002, math.inf]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_linear_gap_has_no_radius_and_a_sphere_a_known_one() -> None:
    """Above the last block only the final norm is left: without it the gap is linear."""
    lm = tiny.language_model("llama")
    straight, last = case(lm), lm.n_layers - 1
    tokens = straight.readout
    # One token a side: its score is its logit.
    straight.readout = ReadoutTokens(tokens.toward[:1], tokens.away[:1], (), tokens.texts)
    norm = lm.sites.final_norm
    assert norm is not None
    with forward_as(norm, lambda hidden: hidden):
        report = linearity(straight, TEXTS, [last])
    assert [row.direction for row in report.rows] == ["gradient", "vector", "random"]
    assert all(math.isinf(row.radius.median) for row in report.rows)
    # With it, the gap is w . h / rms(h), which a push across h bends.
    report = linearity(straight, TEXTS, [last])
    assert all(math.isfinite(row.radius.median) for row in report.rows)


def test_real_pushes_depart_at_the_radius(llama: LanguageModel) -> None:
    tokens, layer = readout_tokens(llama, BEHAVIOR), 1
    report = linearity(case(llama), TEXTS[:2], [layer])
    row = next(r for r in report.rows if r.direction == "vector")
    # Of two values the 5th and 95th percentile say both.
    spread = (row.radius.p95 - row.radius.p5) / 0.9
    expected = [row.radius.median - spread / 2, row.radius.median + spread / 2]
    c = vector(llama).directions[layer]
    found = []
    for text in TEXTS[:2]:
        (course,) = courses(llama, [llama.encode(text)])
        gradient = pulled_back(llama, tokens, course.batch)[layer + 1][0, -1]
        hidden = course.hidden(layer + 1)[0, -1]
        lengths = torch.logspace(-3, 0.6, 300)
        steps = lengths[:, None] * hidden.norm() * c
        pushes = torch.zeros(2 * len(lengths), *course.entry.shape)
        pushes[:, 0, -1] = torch.cat([steps, -steps])
        gaps = moved_gaps(llama, tokens, course, layer + 1, torch.cat([0 * pushes[:1], pushes]))
        change = gaps[1:, 0] - gaps[0, 0]
        off = departure(change, (pushes[:, 0, -1] @ gradient).double()).view(2, -1).amax(0)
        found.append(float(lengths[int((off >= 0.1).nonzero()[0])]))
    # Between two lengths tried, four times apart, the curve is taken for a power.
    assert sorted(found) == pytest.approx(expected, rel=0.3)


def test_on_every_architecture(lm: LanguageModel) -> None:
    report = linearity(case(lm), TEXTS, [0, 2])
    assert len(report.rows) == 6
    for row in report.rows:
        assert row.radius.median > 0 and row.token_edit.median > 0
    edits = report.edits
    assert edits.n == 2 * len(TEXTS) and edits.size.median > 0
    assert 0 <= edits.beyond.mean <= 1 and -1 <= edits.correlation <= 1
    json.dumps(report.to_dict())
    assert linearity(case(lm), TEXTS, [0, 2]).to_dict() == report.to_dict()


def test_the_way_to_another_token_ends_at_the_other_prompt(llama: LanguageModel) -> None:
    """At the end of the walk the gap is that of the edited prompt: the whole departure is real."""
    tokens = readout_tokens(llama, BEHAVIOR)
    one = llama.encode(TEXTS[1])
    other = type(one)(
        one.text, [*one.ids[:6], 40, *one.ids[7:]], one.prompt_length, one.instruction_end
    )
    (before,), (after,) = courses(llama, [one]), courses(llama, [other])
    pushes = (after.entry - before.entry)[None]
    walked = moved_gaps(llama, tokens, before, 0, pushes)[0]
    straight = moved_gaps(llama, tokens, after, 0, torch.zeros_like(pushes))[0]
    torch.testing.assert_close(walked, straight, rtol=1e-5, atol=1e-5)


def test_refusals(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="different prompts"):
        linearity(case(llama), [TEXTS[0], TEXTS[0]], [1])
