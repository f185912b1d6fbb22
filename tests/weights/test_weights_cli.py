"""`trimtab bake` and `trimtab inspect` on checkpoints, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import planted
import tiny
from trimtab import cli
from trimtab.models.load import load
from trimtab.weights.disk.base import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(planted.language_model(), folder)
    return folder


@pytest.fixture(scope="module")
def vector(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "push.safetensors"
    return planted.push(load(model), scope="all").save(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return left.value.code, " ".join((said.out + said.err).split())

    return ran


def test_plan_writes_nothing(run, model, vector, tmp_path):
    before = sorted(model.iterdir())
    code, said = run("bake", model, vector, "--plan", "--json", tmp_path / "p.json")
    assert code == 0 and "exact by bias" in said and "layers added: 0" in said
    assert sorted(model.iterdir()) == before and [p.name for p in tmp_path.iterdir()] == ["p.json"]
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert rows[0]["route"] == "bias" and rows[0]["layers"] == [3]
    code, said = run("bake", model, vector, "--plan", "--every-writer", 3, "--route", "null_block")
    assert code == 0 and "rank-1 update of the writers" in said


def test_a_plan_of_what_cannot_be_says_why(run, model, tmp_path):
    last = planted.push(load(model), scope="last").save(tmp_path / "last.safetensors")
    code, said = run("bake", model, last, "--plan")
    assert code == 0 and "refused: weights act on every token alike" in said and "hook" in said
    code, said = run("bake", model, last, "-o", tmp_path / "out")
    assert code == 2 and "every token alike" in said and not (tmp_path / "out").exists()


def test_several_files_and_a_folder_to_inspect(run, model, vector, tmp_path):
    out = tmp_path / "out"
    code, said = run("bake", model, vector, vector, "-o", out, "--copy", "--json", tmp_path / "r")
    assert code == 0 and json.loads((tmp_path / "r").read_text())["equal_text"] is True
    code, said = run("inspect", out, "--json", tmp_path / "i")
    facts = json.loads((tmp_path / "i").read_text())
    assert code == 0 and "baked by Trimtab" in said and len(facts["baked"]["steerings"]) == 2
    file = out / "model.safetensors"
    stray = {"model.layers.0.mlp.extra": torch.ones(2)}
    save_file({**load_file(file), **stray}, file, metadata={"format": "pt"})
    code, said = run("inspect", out)
    assert code == 0 and "model.layers.0.mlp.extra" in said and "loading drops 1" in said


def test_a_soft_prompt_is_known_by_its_file(run, model, tmp_path):
    save_file({"prompt": torch.randn(2, tiny.WIDTH)}, tmp_path / "soft.safetensors")
    code, said = run("bake", model, tmp_path / "soft.safetensors", "-o", tmp_path / "out")
    assert code == 0 and "soft prompt to vocabulary" in said
    code, said = run("inspect", tmp_path / "out")
    assert code == 0 and "soft prompt to vocabulary" in said


def test_a_folder_is_asked_for(run, model, vector):
    code, said = run("bake", model, vector)
    assert code == 2 and "give one with -o" in said
