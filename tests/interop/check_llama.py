"""Real llama.cpp with a control vector: the hook's logits, and block N for every N."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from interop.programs import HERE, call, directions, harbor, interpreter
from trimtab import harbor as built_in
from trimtab.export import write_gguf
from trimtab.steering import VectorSteering

ALPHA = 250.0
TOLERANCE = 0.05  # half precision on logits of about 20


def converted(folder: Path) -> Path:
    out = folder / "harbor.gguf"
    source = os.environ["TRIMTAB_LLAMA_SOURCE"]
    script = [interpreter("tools"), HERE / "convert_harbor.py", source, built_in.path()]
    done = subprocess.run(
        [*script, "--outtype", "f32", "--outfile", out], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_every_layer_is_the_hooks_layer(tmp_path):
    lm, prompts = harbor()
    prompts = prompts[::4]
    model = converted(tmp_path)

    def last_logits() -> torch.Tensor:
        with torch.no_grad():
            rows = [lm.model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
        return torch.stack(rows)

    files: list[str | None] = [None]
    wanted = [last_logits()]
    for layers in (*((n,) for n in range(1, lm.n_layers)), (2, 5)):
        vector = VectorSteering.from_directions(lm, directions(lm, layers), alpha=ALPHA)
        files.append(str(write_gguf(vector, tmp_path / f"{len(files)}.gguf", "llama")))
        with vector.on(lm):
            wanted.append(last_logits())
    asked = {"model": str(model), "prompts": prompts, "vectors": files}
    found = torch.tensor(call("tools", "llama_logits.py", asked, tmp_path))
    for number, logits in enumerate(found):
        off = [float((logits - each).abs().max()) for each in wanted]
        assert off[number] < TOLERANCE, (number, off)
        assert all(far > 10 * TOLERANCE for n, far in enumerate(off) if n != number), (number, off)
        assert torch.equal(logits.argmax(-1), wanted[number].argmax(-1)), number
