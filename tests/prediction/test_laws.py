"""tt.laws() and `trimtab laws` are one thing: prediction, check, calibration and recovery in a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import planted
import trimtab as tt
from trimtab.cli import main


def test_the_command_writes_what_the_function_returns(tmp_path: Path) -> None:
    lm, folder, file = planted.language_model(), tmp_path / "model", tmp_path / "v.safetensors"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    content = planted.behavior(readout={"toward": ["Z"], "away": ["Q"]}).to_dict()
    behavior = tmp_path / "opening.yaml"
    behavior.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    planted.push(lm).save(file)
    page, measured = tmp_path / "page", tmp_path / "laws.json"
    caps = ["--max-prompts", "2", "--max-new-tokens", "3", "--direction", "away"]
    written = ["--out", str(page), "--json", str(measured)]
    main_exits(["laws", str(folder), str(behavior), str(file), *caps, *written], 0)

    lm = tt.load(str(folder), dtype=torch.float32)
    split, vector = tt.behavior(str(behavior)), tt.load_steering(file)
    assert isinstance(vector, tt.VectorSteering)
    steps: list[tuple[int, int]] = []
    found = tt.laws(
        lm,
        split,
        vector,
        direction="away",
        max_prompts=2,
        max_new_tokens=3,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert json.loads(measured.read_text()) == found.to_dict()
    assert steps == [(i, 8) for i in range(1, 9)]
    alone = tt.predict_strength(
        lm, split.split().test, vector, direction="away", max_prompts=2, max_new_tokens=3
    )
    assert found.prediction == alone
    assert [check.layers for check in found.depth] == [(0,), (1,), (2,), (3,)]
    assert "where the laws hold" in str(found) and (page / "index.html").exists()


def test_a_model_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    main_exits(["laws"], 2)
    assert "'MODEL'" in capsys.readouterr().err


def main_exits(line: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as left:
        main(line)
    assert (left.value.code or 0) == code
