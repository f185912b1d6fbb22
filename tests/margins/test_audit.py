"""The audit: what closing costs against the hook, its null, two checkpoints, a hardened one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import planted
import trimtab as tt
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import token_kl
from trimtab.evaluation.readout import ReadoutTokens, gap_of, readout_tokens
from trimtab.margins import audit, close, learn_sets
from trimtab.margins.close import close_side, pusher, steepest_layer
from trimtab.margins.radius import gap_gradients
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake

PROMPTS = ["How do I find the pier?", "Why?", "Please talk only about cats and the ferry."]
BEHAVIOR = planted.behavior(10, readout={"toward": ["Z", "Kite"], "away": ["Q"]})
KEYS = {"audited", "gap", "census", "resolution", "radius", "kl_to_close"}


def hooked(
    lm: LanguageModel, layer: int, push: torch.Tensor, prompt: str, tokens: ReadoutTokens
) -> tuple[float, float]:
    """Gap and KL of one prompt with its last position pushed, through the library's own hook."""
    plain = lm.next_logits([prompt]).log_softmax(-1)
    vector = VectorSteering.from_directions(
        lm, {layer: push / push.norm()}, alpha=float(push.norm()), scope="last"
    )
    with vector.on(lm):
        logits = lm.next_logits([prompt])
    return float(gap_of(logits, tokens)), float(token_kl(plain, logits.log_softmax(-1)))


def test_a_push_is_what_the_hook_does(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, BEHAVIOR)
    generator = torch.Generator().manual_seed(0)
    pushes = torch.randn(2, lm.d_model, generator=generator)
    rows = torch.tensor([2, 0])
    for layer in (1, lm.n_layers - 1):
        gaps, kl = pusher(lm, tokens, [lm.encode(p) for p in PROMPTS], layer).push(rows, pushes)
        for place, row in enumerate(rows.tolist()):
            expected = hooked(lm, layer, pushes[place], PROMPTS[row], tokens)
            assert float(gaps[place]) == pytest.approx(expected[0], abs=2e-3)
            assert float(kl[place]) == pytest.approx(expected[1], rel=1e-2, abs=1e-4)
    assert float(kl.max()) > 1e-3


def undecided(logits: torch.Tensor) -> ReadoutTokens:
    """The two tokens of which each is ahead of the other on as many prompts `[n, vocab]`."""
    ahead = (logits[:, :, None] > logits[:, None, :]).double().mean(0)
    first, second = divmod(int((ahead - 0.5).abs().argmin()), logits.shape[1])
    return ReadoutTokens((first,), (second,), (), {first: "first", second: "second"})


def test_closing_stops_where_the_gap_crosses_zero(llama: LanguageModel) -> None:
    prompts = [e.prompt for e in (*BEHAVIOR.toward, *BEHAVIOR.away) if isinstance(e.prompt, str)]
    encoded, layer = [llama.encode(p) for p in prompts], 2
    tokens = undecided(llama.next_logits(prompts))
    gradients = gap_gradients(llama, tokens, encoded)
    pushes = pusher(llama, tokens, encoded, layer)
    shared = gradients.grad[:, layer].mean(0)
    for side, sign in (("toward", 1), ("away", -1)):
        rows = (sign * gradients.gap > 0).nonzero()[:, 0]
        own, one = close_side(pushes, side, gradients, shared)
        assert own.open == one.open == len(rows) > 0 and own.n == len(prompts)
        units = -sign * gradients.grad[rows, layer]
        units = units / units.norm(dim=-1, keepdim=True)
        ceiling = close.CEILING * gradients.norm[rows, layer]
        start = gradients.radius[rows, layer].abs()
        length, kl = close._close(pushes, rows, units, sign, start, ceiling)
        assert own.closed is not None and own.closed.count == int(length.isfinite().sum()) > 0
        assert own.kl.median == pytest.approx(float(kl.quantile(0.5)))
        for place, row in enumerate(rows.tolist()):
            push = units[place] * float(length[place])
            gap, price = hooked(llama, layer, push, prompts[row], tokens)
            before, _ = hooked(llama, layer, 0.985 * push, prompts[row], tokens)
            assert sign * gap < 2e-3 and sign * before > -2e-3
            assert price == pytest.approx(float(kl[place]), rel=1e-2, abs=1e-4)


def test_random_directions_of_that_length_do_not_close() -> None:
    lm = planted.language_model()
    with torch.no_grad():  # prompts that open with Z, a long way off
        z = readout_tokens(lm, BEHAVIOR).toward[0]
        lm.model.get_parameter("lm_head.weight")[z] += 0.5 * lm.model.get_parameter(
            "lm_head.weight"
        ).new_ones(lm.d_model)
    report = audit(lm, BEHAVIOR)
    rows = [row for row in report.kl_to_close.rows if row.open and row.lever == "gradient"]
    assert rows
    for row in rows:
        assert row.closed is not None and row.closed.share == 1.0
        assert row.null_closed <= 0.5 and row.null_low <= row.null_closed <= row.null_high
        assert row.null_kl < row.kl.median


def test_what_cannot_be_closed_is_infinite_not_left_out(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(close, "CEILING", 1e-4)
    report = audit(llama, BEHAVIOR)
    row = next(row for row in report.kl_to_close.rows if row.open)
    assert row.closed is not None and row.closed.count == 0
    assert row.kl.median == math.inf and math.isfinite(row.null_kl) and row.null_closed == 0
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["kl_to_close"]["rows"][report.kl_to_close.rows.index(row)]["kl"]["median"] is None


def test_the_layer_is_the_middle_one_with_the_smallest_radius(llama: LanguageModel) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    train = BEHAVIOR.split(0).train
    found = {
        side: gap_gradients(llama, tokens, [llama.encode(e.prompt) for e in getattr(train, side)])
        for side in ("toward", "away")
    }
    pooled = torch.cat([one.relative.abs() for one in found.values()]).median(dim=0).values
    assert steepest_layer(found, (1, 2)) == (1 if pooled[1] < pooled[2] else 2)
    report = audit(llama, BEHAVIOR)
    assert report.kl_to_close.layer == steepest_layer(found, (1, 2))  # 40 to 90 % of four layers
    assert "train" in report.kl_to_close.layer_from
    assert audit(llama, BEHAVIOR, layer=0).kl_to_close.layer == 0


def test_an_audit_reads_the_test_split_and_changes_nothing(llama: LanguageModel) -> None:
    before = llama.fingerprint
    ids = torch.tensor([llama.encode("Cats?").ids])
    llama.model(ids, output_hidden_states=True)  # the library leaves hooks of its own
    hooks = [len(m._forward_hooks) for m in llama.model.modules()]
    report = audit(llama, BEHAVIOR, aggregator="max")
    held_out = BEHAVIOR.split(0).test
    for side in ("toward", "away"):
        prompts = [e.prompt for e in getattr(held_out, side)]
        expected = gap_of(llama.next_logits(prompts), readout_tokens(llama, BEHAVIOR), "max")
        assert report.gap.sides[side].values["max"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert set(report.to_dict()) == KEYS and report.compared is None
    assert "D0" in str(report) and report.audited.split == "test"
    again = audit(llama, BEHAVIOR, aggregator="max")
    assert replace(again, audited=report.audited).to_dict() == report.to_dict()
    assert llama.fingerprint == before
    assert [len(m._forward_hooks) for m in llama.model.modules()] == hooks
    assert not any("forward" in m.__dict__ for m in llama.model.modules())


def test_a_model_against_itself_differs_by_nothing(llama: LanguageModel) -> None:
    done: list[tuple[int, int]] = []
    report = audit(llama, BEHAVIOR, against=llama, progress=lambda n, total: done.append((n, total)))
    assert report.compared is not None
    assert set(report.to_dict()) == KEYS | {"compared"}
    for side in ("toward", "away"):
        difference = report.compared.difference[side]
        assert difference.gap.median == 0 and difference.standard.p95 == 0
        assert difference.wider is not None and difference.wider.count == 0
    assert report.compared.difference["neutral"].wider is None
    assert report.compared.kl_to_close.rows == report.kl_to_close.rows
    assert done[-1] == (10, 10)


def test_refusals(llama: LanguageModel, plain: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="without readout words"):
        audit(llama, planted.behavior(10))
    with pytest.raises(TrimtabError, match="no such aggregator"):
        audit(llama, BEHAVIOR, aggregator="mean")
    with pytest.raises(TrimtabError, match="0 to 3"):
        audit(llama, BEHAVIOR, layer=4)
    with pytest.raises(TrimtabError, match="max_prompts=0"):
        audit(llama, BEHAVIOR, max_prompts=0)
    tokens = ReadoutTokens((100,), (101,), (), {100: "not", 101: "what they say"})
    with pytest.raises(TrimtabError, match="do not agree"):
        audit(llama, BEHAVIOR, against=plain, sets=tokens)


def test_a_hardened_harbor_has_a_wider_margin(tmp_path: Path) -> None:
    harbor = load("harbor", dtype=torch.float32)
    sizes = {"toward": range(48), "away": range(48), "neutral": range(8)}
    refusal = tt.behavior("refusal").select(sizes)
    vector = tt.find(harbor, refusal).select(scope="all").at(1.0)
    bake(harbor, vector, tmp_path / "hardened")
    hardened = load(str(tmp_path / "hardened"), dtype=torch.float32)
    report = audit(hardened, refusal, against=harbor, baked=[vector])
    assert report.compared is not None
    toward = report.compared.difference["toward"]
    assert toward.gap.low > 0.1 and toward.standard.low > 0
    assert toward.null is not None and toward.gap.mean > abs(toward.null)
    assert report.compared.held_out is True
    assert toward.wider is not None and toward.wider.low > 0.5
    cost, before = (
        next(row.kl for row in part.rows if row.side == "toward" and row.lever == "gradient")
        for part in (report.kl_to_close, report.compared.kl_to_close)
    )
    assert cost.median_low > before.median_high  # and closing it costs more
    assert report.compared.difference["away"].gap.low > 0  # the price: away prompts refuse more
    census = report.compared.census.sides
    assert census["toward"].toward.share == census["away"].away.share == 1.0
    for row in report.compared.kl_to_close.rows:
        assert row.null_closed == 0
    learned = audit(harbor, refusal, sets=learn_sets(harbor, refusal), max_prompts=6)
    assert learned.resolution.source == "learned"
    assert learned.gap.sides["toward"].gap.median > 0 > learned.gap.sides["away"].gap.median
