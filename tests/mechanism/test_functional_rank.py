"""Functional rank where the gap is linear: every share is known by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

import planted
import tiny
from tiny import forward_as
from trimtab.behaviors.behavior import Splits
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import ReadoutTokens, readout_tokens
from trimtab.margins.radius import gap_gradients
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.functional_rank import (
    FunctionalRank,
    _row,
    functional_rank,
    smallest,
)
from trimtab.mechanism.geometry.rank import leading
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

READOUT = {"toward": ["Z"], "away": ["Q"]}
BEHAVIOR = planted.behavior(n=10, readout=READOUT)
KS = (1, 2, 5, 32)
LAST = 3


@pytest.fixture(scope="module")
def straight() -> Iterator[LanguageModel]:
    """Without the final norm the gap, largest logit against largest, is linear in the last stream."""
    lm = tiny.language_model("llama")
    norm = lm.sites.final_norm
    assert norm is not None
    with forward_as(norm, lambda hidden: hidden):
        yield lm


def halves() -> tuple:
    train = BEHAVIOR.select({side: range(0, 6) for side in ("toward", "away")})
    test = BEHAVIOR.select({side: range(6, 10) for side in ("toward", "away")})
    return train, test


def vector(lm: LanguageModel) -> VectorSteering:
    return VectorSteering.from_directions(lm, {LAST: torch.ones(lm.d_model)})


def ranked(
    lm: LanguageModel,
    own: VectorSteering,
    tokens: ReadoutTokens,
    layer: int,
    ks: Sequence[int],
    held_out: int = 16,
) -> FunctionalRank:
    train, test = halves()
    case = Case(lm, BEHAVIOR, own)
    case.readout, case.splits = tokens, Splits(train, test, test)
    gradients = {
        side: gap_gradients(lm, tokens, [lm.encode(e.prompt) for e in getattr(train, side)])
        for side in ("toward", "away")
    }
    return functional_rank(case, layer, (6, held_out), ks, gradients)


def states(lm: LanguageModel, part, side: str) -> torch.Tensor:
    encoded = [lm.encode(example.prompt) for example in getattr(part, side)]
    values = capture(lm, encoded, [LAST])
    return values[:, 0, 0].double()


def single(lm: LanguageModel):
    """One token a side, so that the largest logit is always the same one's."""
    found = readout_tokens(lm, BEHAVIOR)
    return type(found)(found.toward[:1], found.away[:1], (), found.texts)


def test_shares_are_those_of_the_readout_row(straight: LanguageModel) -> None:
    lm, (train, test) = straight, halves()
    tokens = single(lm)
    report = ranked(lm, vector(lm), tokens, LAST, KS)
    rows = lm.sites.unembedding.get_parameter("weight").detach().double()
    w = rows[tokens.toward[0]] - rows[tokens.away[0]]
    moves = {
        "added": states(lm, test, "toward") - states(lm, test, "away"),
        "ablated": states(lm, train, "away").mean(0) - states(lm, test, "toward"),
    }
    basis = leading(states(lm, train, "toward") - states(lm, train, "away"))
    c = vector(lm).directions[LAST].double()
    for mode, sign in (("added", 1), ("ablated", -1)):
        row = report.row(mode, "differences")
        full = moves[mode] @ w
        assert row.full.mean == pytest.approx(float(sign * full.mean()), rel=1e-3)
        for point in row.curve:
            part = moves[mode] @ basis[: point.k].T @ basis[: point.k] @ w
            expected = float(part.mean() / full.mean())
            assert point.share.mean == pytest.approx(expected, rel=1e-3, abs=1e-3)
        alone = float((moves[mode] @ c * (c @ w)).mean() / full.mean())
        assert row.vector.mean == pytest.approx(alone, rel=1e-3, abs=1e-3)
        # One readout row: its span is all that counts, whatever the rank of the states.
        gradients = report.row(mode, "gradients")
        assert [point.share.mean for point in gradients.curve] == pytest.approx([1.0] * 4, rel=1e-3)
        everything = report.row(mode, "random").curve[-1]
        assert everything.k == lm.d_model
        assert everything.share.mean == pytest.approx(1, rel=1e-3)
    assert report.n == 4 and report.trained == 6
    json.dumps(report.to_dict())
    assert report.table().rows[0][1] == "differences"


def test_the_smallest_dimension_and_its_interval() -> None:
    ks = (1, 2, 4, 8)
    assert smallest(ks, torch.tensor([0.2, 0.91, 0.8, 1.0])) == 2
    assert smallest(ks, torch.tensor([0.2, 0.5, 0.8, 0.89])) == math.inf
    full = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 0.8], dtype=torch.float64)
    changes = torch.stack([share * full for share in (0.3, 0.6, 0.95, 1.0)])
    row = _row("added", "differences", ks, full, changes, None, 0)
    assert (row.k, row.low, row.high) == (4, 4, 4)
    assert row.curve[1].share.mean == pytest.approx(0.6)
    assert row.curve[1].share.low == pytest.approx(0.6)  # the same share of every prompt
    assert math.isnan(row.vector.mean)
    # Prompts that need different dimensions widen the interval.
    mixed = changes.clone()
    mixed[1, :3] = full[:3]
    mixed[0, 3:] = full[3:]
    wide = _row("added", "differences", ks, full, mixed, None, 0)
    assert wide.low < wide.high
    # Nothing to explain: no rank.
    around = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.1, -0.1], dtype=torch.float64)
    nothing = _row("added", "differences", ks, around, changes, None, 0)
    assert math.isnan(nothing.k)


def test_on_every_architecture(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, BEHAVIOR)
    own = VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)})
    report = ranked(lm, own, tokens, 1, (1, 4))
    assert len(report.rows) == 6
    assert report.row("added", "random").curve[0].share.mean != 1
    same = ranked(lm, own, tokens, 1, (1, lm.d_model))
    assert same.row("ablated", "random").curve[-1].share.mean == pytest.approx(1, abs=1e-2)


def test_refusals(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="1 held-out"):
        ranked(llama, vector(llama), readout_tokens(llama, BEHAVIOR), 1, KS, held_out=1)
