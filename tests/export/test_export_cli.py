"""`trimtab export`, as typed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import planted
from trimtab import cli
from trimtab.export import read_gguf
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
    return planted.push(load(str(model)), scope="all").save(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return left.value.code, " ".join((said.out + said.err).split())

    return ran


def test_each_form(run, model, vector, tmp_path):
    code, said = run("export", model, vector, "--to", "gguf", "-o", tmp_path / "v.gguf", "--strength", -2)  # fmt: skip
    assert code == 0 and "wrote" in said
    back = read_gguf(tmp_path / "v.gguf")
    assert back.layers == (3,) and back.alphas[3] == pytest.approx(20.0, rel=1e-5)
    code, _ = run("export", model, vector, "--to", "peft", "-o", tmp_path / "adapter")
    assert code == 0 and (tmp_path / "adapter" / "adapter_config.json").is_file()
    code, _ = run(
        "export", model, vector, "--to", "peft", "-o", tmp_path / "x", "--every-writer", 3
    )
    assert (
        code == 0 and "lora_embedding" not in (tmp_path / "x" / "adapter_config.json").read_text()
    )
    code, _ = run("export", model, vector, "--to", "lm-eval", "-o", tmp_path / "v.pt")
    assert code == 0 and (tmp_path / "v.pt").stat().st_size > 0


def test_refusals_leave_nothing(run, model, vector, tmp_path, monkeypatch):
    last = planted.push(load(str(model)), scope="last").save(tmp_path / "last.safetensors")
    for form, name in (("gguf", "v.gguf"), ("peft", "adapter"), ("lm-eval", "v.pt")):
        code, said = run("export", model, last, "--to", form, "-o", tmp_path / name)
        assert code == 2 and "scope last" in said and "Traceback" not in said
    code, said = run("export", model, vector, "--to", "lm-eval", "-o", tmp_path / "v.csv")
    assert code == 2 and "sparse autoencoder" in said
    every = ("--to", "gguf", "--every-writer", 3)
    code, said = run("export", model, vector, *every, "-o", tmp_path / "v.gguf")
    assert code == 2 and "--to peft" in said
    code, said = run("export", "harbor", vector, "--to", "gguf", "-o", tmp_path / "v.gguf")
    assert code == 2 and "made for" in said
    monkeypatch.setitem(sys.modules, "peft", None)
    code, said = run("export", model, vector, "--to", "peft", "-o", tmp_path / "out")
    assert code == 2 and "trimtab[peft]" in said
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
