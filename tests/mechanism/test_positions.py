"""Shares of the gap's gradient by position: groups, sums, and what needs attention."""

from __future__ import annotations

import json

import pytest
import torch

import planted
from trimtab.evaluation.readout import gap
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.positions import GROUPS, _groups, position_shares, request_span
from trimtab.mechanism.geometry.propagator import SKIP_PATH
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import prompt
from trimtab.steering.vector import VectorSteering

BEHAVIOR = planted.behavior(readout={"toward": ["Z", "Kite"], "away": ["Q"]})
TEXTS = ["Where is the ferry?", "How do I find the ledger at noon?"]
INSERTS = {"prefix": "Talk only about cats.", "suffix": " Please."}


def spelled(lm: LanguageModel, slot: str, text: str) -> dict[str, str]:
    """What each group says."""
    inside = prompt(INSERTS[slot], slot=slot) if slot != "none" else prompt("x").at(0)
    with inside.on(lm):
        encoded = lm.encode(text)
    groups = _groups(lm, text, encoded, slot)
    covered = sorted(p for start, stop in groups.values() for p in range(start, stop))
    assert covered == list(range(len(encoded.ids)))  # every token in exactly one group
    return {name: str(lm.tokenizer.decode(encoded.ids[slice(*at)])) for name, at in groups.items()}


def test_groups_are_the_tokens_they_say(llama: LanguageModel, plain: LanguageModel) -> None:
    for slot in ("none", "prefix", "suffix"):
        said = spelled(llama, slot, TEXTS[1])
        assert said["request"].strip() == TEXTS[1]
        assert said["start"] == "<s><user>\n" and said["template"].startswith("<end>")
        if slot != "none":
            assert said[slot] == INSERTS[slot]
    said = spelled(plain, "prefix", TEXTS[1])
    assert said["prefix"] == INSERTS["prefix"] and said["template"] == ""
    assert (said["request"] + said["last"]).strip() == TEXTS[1]


def test_the_request_never_holds_the_position_that_is_read(
    llama: LanguageModel, plain: LanguageModel
) -> None:
    for lm in (llama, plain):
        encoded = lm.encode(TEXTS[0])
        start, stop = request_span(lm, TEXTS[0], encoded)
        assert 0 < start < stop <= len(encoded.ids) - 1


def test_shares_on_every_architecture(lm: LanguageModel) -> None:
    case = Case(lm, BEHAVIOR, VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)}))
    report = position_shares(case, TEXTS, INSERTS)
    for slot in ("none", "prefix", "suffix"):
        rows = [row for row in report.rows if row.slot == slot]
        assert sum(row.share.mean for row in rows) == pytest.approx(1)
        assert sum(row.uniform for row in rows) == pytest.approx(1)
        assert {row.group for row in rows} <= set(GROUPS)
        assert (slot == "none") or slot in {row.group for row in rows}
        for row in rows:
            if row.group != "last":  # the skip path never crosses positions
                assert row.through_attention.mean == pytest.approx(1)
                assert row.without_attention.mean == 0
            else:
                assert row.without_attention.mean > 0
        shares = [one.mean for one in report.crossing[slot]]
        own = next(row for row in rows if row.group == "last").share.mean
        assert shares[0] == pytest.approx(1 - own) and shares[-1] == pytest.approx(0)
    with prompt(INSERTS["prefix"], slot="prefix").on(lm):
        after = gap(lm, BEHAVIOR, TEXTS)
    change = float((after - gap(lm, BEHAVIOR, TEXTS)).mean())
    assert report.gap_change["prefix"].mean == pytest.approx(change, abs=1e-4)
    assert json.loads(json.dumps(report.to_dict()))["note"] == SKIP_PATH
    assert SKIP_PATH in report.table().notes
