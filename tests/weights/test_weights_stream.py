"""The out-of-core writer: what it writes, what it shares, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.results.files import remove_leftovers, staged
from trimtab.steering.vector import VectorSteering
from trimtab.weights import bake, plan
from trimtab.weights.disk import stream
from trimtab.weights.disk.checkpoint import open_checkpoint
from trimtab.weights.disk.sources import ProjectedSource, copied

PROMPTS = ["The ferry leaves the harbor at noon."]


def direction(seed: int) -> torch.Tensor:
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def sharded(tmp_path: Path, name: str = "llama", **settings: object):
    """A base in several files; the largest fits none of them together with another."""
    config = tiny.config(name)
    for key, value in settings.items():
        setattr(config, key, value)
    lm = tiny.language_model(config)
    base = tmp_path / "base"
    lm.model.save_pretrained(base, max_shard_size="50KB")
    lm.tokenizer.save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 3
    return lm, base


def steering(lm, layers=(1, 2)) -> VectorSteering:
    return VectorSteering.from_directions(lm, {n: direction(n) for n in layers}, 0.8)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_new_biases_take_one_small_file_and_the_rest_is_shared(tmp_path):
    lm, base = sharded(tmp_path)
    before = contents(base)
    report = bake(base, steering(lm), tmp_path / "out")
    assert contents(base) == before
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    old = {os.stat(p).st_ino for p in base.glob("*.safetensors")}
    shared = [p for p in files if os.stat(p).st_ino in old]
    assert len(shared) == len(files) - 1 == len(old)
    assert report.plan is not None and report.plan.files_written == 1
    assert report.plan.bytes_written < 10_000
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in files}
    assert index["metadata"]["total_size"] == open_checkpoint(tmp_path / "out").nbytes


def test_only_the_shards_of_a_changed_tensor_are_written(tmp_path):
    lm, base = sharded(tmp_path, mlp_bias=True)
    names = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {names[f"model.layers.{n}.mlp.down_proj.bias"] for n in (1, 2)}
    bake(base, steering(lm), tmp_path / "out")
    for file in base.glob("*.safetensors"):
        same = os.path.samefile(file, tmp_path / "out" / file.name)
        assert same == (file.name not in wanted), file.name
    old, new = (open_checkpoint(tmp_path / n) for n in ("base", "out"))
    assert {n: f.file.name for n, f in old.tensors.items()} == {
        n: f.file.name for n, f in new.tensors.items()
    }


@pytest.mark.parametrize("name", ["qwen3", "phi3", "mixtral", "gemma2"])
def test_shards_survive_added_blocks_and_conversions(tmp_path, name):
    lm, base = sharded(tmp_path, name)
    report = bake(base, steering(lm), tmp_path / "out")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-5


def test_copies_share_nothing(tmp_path):
    lm, base = sharded(tmp_path)
    bake(base, steering(lm), tmp_path / "out", copy=True)
    assert {os.stat(p).st_nlink for p in (tmp_path / "out").glob("*.safetensors")} == {1}


def test_a_system_without_links_copies(tmp_path, monkeypatch):
    lm, base = sharded(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    bake(base, steering(lm), tmp_path / "out")
    assert {os.stat(p).st_nlink for p in (tmp_path / "out").glob("*.safetensors")} == {1}
    assert load(str(tmp_path / "out")).generate(PROMPTS)


def test_everything_that_belongs_to_the_model_comes_along(tmp_path):
    lm, base = sharded(tmp_path)
    for name in ("LICENSE", "special_tokens_map.json", "tokenizer.model"):
        (base / name).write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "README.md").write_text("the base model's own card")
    vector = replace(steering(lm), fingerprint="")
    bake(base, vector, tmp_path / "out", verify=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    carried = {"LICENSE", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja"}
    assert carried | {"generation_config.json", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names
    assert "base model's own" not in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True and config["num_hidden_layers"] == tiny.LAYERS


def test_too_little_space_is_found_before_a_byte_is_written(tmp_path, monkeypatch):
    lm, base = sharded(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    with pytest.raises(TrimtabError, match="GiB free"):
        bake(base, steering(lm), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_projection_in_pieces_is_the_projection_whole(tmp_path, monkeypatch):
    lm, base = sharded(tmp_path)
    fact = open_checkpoint(base).tensors["model.layers.0.mlp.down_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 32, 2, generator=generator, dtype=torch.float64)
    whole = lm.model.state_dict()["model.layers.0.mlp.down_proj.weight"].double()
    monkeypatch.setattr("trimtab.weights.disk.sources.PIECE", 16 * 48 * 5)  # five rows at a time
    source = ProjectedSource(copied(fact), left, right, by_rows=True)
    pieces = list(source.pieces())
    assert len(pieces) == 7
    got = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32).view(32, 48)
    assert torch.allclose(got, (whole - left @ (right.T @ whole)).float(), rtol=1e-6, atol=1e-6)
    assert 0 < source.rounding < 1e-6


def test_peak_memory_does_not_grow_with_the_model():
    """Written by a process of its own, from tensors of 64 MiB each."""
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import baking\n"
        "print(baking.peak_of_bake(sys.argv[2], tensors=8, mebibytes=64))\n"
    )
    bench = str(Path(__file__).parents[2] / "bench")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, bench, folder], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    grown, largest = map(int, done.stdout.split()[-2:])
    assert grown <= 2 * largest + (300 << 20)


KILLED = """
import sys, pathlib
from trimtab.weights import bake
from trimtab.weights.disk import stream
from trimtab.steering.load import load_steering
import time
honest = stream._write_file
def slow(file, target):
    honest(file, target)
    print("wrote", flush=True)
    time.sleep(30)
stream._write_file = slow
bake(sys.argv[1], load_steering(sys.argv[2]), sys.argv[3])
"""


def test_kill_leaves_the_old_state_and_the_next_run_cleans_up(tmp_path):
    lm, base = sharded(tmp_path)
    steering(lm).save(tmp_path / "v.safetensors")
    before, out = contents(base), tmp_path / "out"
    arguments = [str(base), str(tmp_path / "v.safetensors"), str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None and process.stdout.readline() == b"wrote\n"
    partial = list(tmp_path.glob(".out.*.partial"))
    # A run that lives is left alone, one that was killed is cleaned up after.
    assert len(partial) == 1 and remove_leftovers(out) == [] and not out.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and partial[0].is_dir()
    bake(base, steering(lm), out)
    assert (out / "config.json").is_file() and not list(tmp_path.glob(".out*"))
    assert contents(base) == before


def test_leftovers_of_other_targets_stay(tmp_path):
    for name in (".out.1234.partial", ".other.1234.partial", ".out*.1234.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    assert [p.name for p in remove_leftovers(tmp_path / "out")] == [".out.1234.partial"]
    assert [p.name for p in remove_leftovers(tmp_path / "out*")] == [".out*.1234.partial"]


def test_a_folder_just_begun_is_not_yet_abandoned(tmp_path):
    old = tmp_path / ".out.2.partial"
    with staged(tmp_path / "out") as building:
        old.mkdir()
        assert not any(building.iterdir())
        assert remove_leftovers(tmp_path / "out") == [old] and building.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), staged(tmp_path / "out") as building:
        (building / "a").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as building:
        (building / "a").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda b: (b / "config.json").unlink(), "no config.json"),
        (lambda b: next(b.glob("*-00001-*")).write_bytes(b"\0" * 4), "safetensors"),
        (lambda b: next(b.glob("*-00001-*")).unlink(), "No such file"),
        (lambda b: (b / "model.safetensors.index.json").unlink(), "neither"),
        (lambda b: (b / "model.safetensors.index.json").write_text("[]"), "no JSON object"),
        (
            lambda b: (b / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "../../secret.safetensors"}}'
            ),
            "an index with the files",
        ),
    ],
)
def test_a_broken_base_is_one_error(tmp_path, damage, found):
    lm, base = sharded(tmp_path)
    damage(base)
    with pytest.raises(TrimtabError, match=found):
        plan(base, steering(lm))


def test_a_file_cut_short_is_found(tmp_path):
    lm, base = sharded(tmp_path)
    file = next(base.glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TrimtabError, match="do not fit its shape or the file"):
        bake(base, steering(lm), tmp_path / "out")


def test_tensors_keep_their_bytes(tmp_path):
    lm, base = sharded(tmp_path, "qwen3")
    bake(base, steering(lm, (1,)), tmp_path / "out", verify=False)
    old = {k: v for p in base.glob("*.safetensors") for k, v in load_file(p).items()}
    new = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    for name, tensor in old.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) > 1:  # behind the added block
            parts[2] = str(int(parts[2]) + 1)
        assert torch.equal(new[".".join(parts)], tensor), name
