"""Real llama.cpp with a control vector: the hook's logits, and block N for every N."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from interop.programs import HERE, call, directions, harbor, interpreter
from trimtab import harbor as built_in
from trimtab.export import write_gguf
from trimtab.steering.vector import VectorSteering

ALPHA = 250.0
TOLERANCE = 0.005  # llama.cpp's cache is in half precision; logits reach 20


def source() -> Path:
    return Path(os.environ["TRIMTAB_LLAMA_SOURCE"])


def done(*command: str | Path, folder: Path) -> bytes:
    found = subprocess.run(command, capture_output=True, cwd=folder, timeout=300)
    assert found.returncode == 0, found.stderr[-4000:].decode()
    return found.stdout


@pytest.fixture(scope="module")
def loader(tmp_path_factory) -> Path:
    """llama.cpp's loader of control vectors as a program, linked with the installed libraries."""
    folder = tmp_path_factory.mktemp("loader")
    ask = "import sysconfig; print(sysconfig.get_path('platlib'))"
    libraries = Path(done(interpreter("tools"), "-c", ask, folder=folder).decode().strip()) / "lib"
    headers = [f"-I{source() / each}" for each in ("common", "include", "ggml/include")]
    # --disable-new-dtags: the libraries find each other by this path too.
    path = f"-Wl,--disable-new-dtags,-rpath,{libraries},-rpath-link,{libraries}"
    linked = [f"-L{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base", path]
    program = folder / "control_vector"
    made = [os.environ.get("CXX", "g++"), "-std=c++17", *headers, HERE / "control_vector.cpp"]
    done(*made, "-o", program, *linked, folder=folder)
    return program


def converted(folder: Path) -> Path:
    """The built-in model as llama.cpp's own converter writes it."""
    out = folder / "harbor.gguf"
    script = [interpreter("tools"), HERE / "convert_harbor.py", source(), built_in.path()]
    done(*script, "--outtype", "f32", "--outfile", out, folder=folder)
    return out


def test_every_layer_is_the_hooks_layer(tmp_path, loader, record_property):
    lm, prompts = harbor()

    @torch.no_grad()
    def last_logits() -> torch.Tensor:
        rows = [lm.model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
        return torch.stack(rows)

    files: list[str | None] = [None]
    wanted = {"unsteered": last_logits()}
    for layers in (*((n,) for n in range(1, lm.n_layers)), (2, 5)):
        vector = VectorSteering.from_directions(lm, directions(lm, layers), alpha=ALPHA)
        written = write_gguf(vector, tmp_path / f"{len(files)}.gguf", "llama")
        held = written.with_suffix(".f32")
        held.write_bytes(done(loader, written, folder=tmp_path))
        files.append(str(held))
        with vector.on(lm):
            wanted[str(layers)] = last_logits()
    asked = {"model": str(converted(tmp_path)), "prompts": prompts, "vectors": files}
    found = torch.tensor(call("tools", "llama_logits.py", asked, tmp_path))
    # Nothing that llama.cpp can be told is this one.
    vector = VectorSteering.from_directions(lm, directions(lm, (0,)), alpha=ALPHA)
    with vector.on(lm):
        wanted["(0,)"] = last_logits()

    for (name, meant), logits in zip(wanted.items(), found, strict=False):
        off = {each: float((logits - other).abs().max()) for each, other in wanted.items()}
        others = min(far for each, far in off.items() if each != name)
        same = int((logits.argmax(-1) == meant.argmax(-1)).sum())
        error = f"largest logit error {off[name]:.2g}, to another layer {others:.3g}"
        record_property(name, f"{error}; same likeliest token {same} of {len(prompts)}")
        assert off[name] < TOLERANCE, (name, off)
        assert others > 10 * TOLERANCE, (name, off)
        assert same == len(prompts), name


def test_block_0_has_no_name(tmp_path, loader):
    for number in (0, 1):
        path = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_tensor(f"direction.{number}", np.ones(256, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    refused = subprocess.run([loader, tmp_path / "0.gguf"], capture_output=True, timeout=60)
    assert refused.returncode == 1
    assert len(done(loader, tmp_path / "1.gguf", folder=tmp_path)) == 4 * 256
