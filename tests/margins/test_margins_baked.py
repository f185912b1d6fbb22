"""Hardening: the margin of a baked checkpoint against its base, beside a null of what was baked in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

import planted
from trimtab.behaviors.file import load_behavior
from trimtab.cli import main
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import gap
from trimtab.margins import audit
from trimtab.margins.baked import held_out, recorded
from trimtab.models.baked import RECORD, read_record
from trimtab.models.load import load
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.weights import bake


@pytest.fixture(scope="module")
def lm():
    return planted.language_model()


READOUT = {"toward": ["Z"], "away": ["Q"]}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_audit_holds_the_margin_before_and_after(lm, tmp_path, sign):
    behavior = planted.behavior(10, readout=READOUT)
    vector = planted.push(lm, scope="all").at(sign)
    bake(lm, vector, tmp_path / "out")
    baked, tested = load(str(tmp_path / "out")), behavior.split(0).test
    found = audit(baked, behavior, against=lm, baked=[vector])
    assert found.audited.behavior == "opening" and found.audited.data_hash == behavior.data_hash
    assert found.compared is not None
    for side in ("toward", "away"):
        prompts = [example.prompt for example in getattr(tested, side)]
        before, after = (float(gap(one, behavior, prompts).mean()) for one in (lm, baked))
        moved = []
        for seed in null_seeds(0, 3):
            with random_null(vector, seed).on(lm):
                moved.append(float(gap(lm, behavior, prompts).mean()) - before)
        row = found.compared.difference[side]
        assert row.n == len(prompts) and row.null is not None
        assert found.compared.gap.sides[side].gap.mean == pytest.approx(before, abs=1e-4)
        assert found.gap.sides[side].gap.mean == pytest.approx(after, abs=1e-4)
        assert row.gap.mean == pytest.approx(after - before, abs=1e-4)
        assert row.null == pytest.approx(sum(moved) / 3, abs=1e-4)
        assert row.gap.mean * sign > 1.0 and abs(row.null) < abs(row.gap.mean)
        assert row.gap.low <= row.gap.mean <= row.gap.high
    table = found.compared.table()
    assert table.columns[-1] == "mean difference by a random control" and "not recorded" in table.notes[-1]
    assert "trimtab audit THIS BEHAVIOR" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_says_itself_how_large_the_null_has_to_be(lm, tmp_path, capsys):
    behavior = planted.behavior(10, readout=READOUT)
    made = {"data_hash": behavior.data_hash, "seed": 0, "split": "train", "behavior": "opening"}
    vector = replace(planted.push(lm, scope="all").at(0.5), provenance=made)
    base = tmp_path / "base"
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    bake(str(base), vector, tmp_path / "out")
    plain = load(str(base))
    record = read_record(tmp_path / "out")
    assert record is not None
    (back,) = recorded(record, plain)
    for name in ("layers", "alphas", "strength", "site", "operation", "scope"):
        assert getattr(back, name) == getattr(vector, name)
    assert held_out([back], behavior, 0) is True
    assert recorded(record, planted.language_model()) != []  # the same weights
    assert recorded({**record, "base_fingerprint": "another"}, plain) == []
    with pytest.raises(TrimtabError, match=RECORD):
        recorded({"base_fingerprint": "", "steerings": [{}]}, plain)
    file, out = tmp_path / "opening.yaml", tmp_path / "found.json"
    content = behavior.to_dict()
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    assert load_behavior(str(file)).data_hash == behavior.data_hash
    arguments = [tmp_path / "out", file, "--against", base, "--full", "--json", out]
    with pytest.raises(SystemExit) as stop:
        main(["audit", *map(str, arguments)])
    assert stop.value.code == 0
    data = json.loads(out.read_text())["compared"]
    row = data["difference"]["toward"]
    assert data["held_out"] is True and 0 < abs(row["null"]) < row["gap"]["mean"]
    assert "found on other prompts" in " ".join(capsys.readouterr().out.split())


def test_the_audit_says_whether_its_prompts_are_new_to_the_vector(lm):
    behavior = planted.behavior(10, readout=READOUT)
    vector = planted.push(lm, scope="all")

    def said(**made: object) -> bool | None:
        found = replace(vector, provenance={"data_hash": behavior.data_hash, "seed": 0, **made})
        return held_out([found], behavior, 0)

    assert said(split="train") is True and said(split=None) is False
    assert said(split="train", data_hash="x") is None
    assert held_out([vector], behavior, 0) is None


def test_a_null_without_a_second_checkpoint_is_refused(lm):
    with pytest.raises(TrimtabError, match="no second checkpoint"):
        audit(lm, planted.behavior(10, readout=READOUT), baked=[planted.push(lm)])
