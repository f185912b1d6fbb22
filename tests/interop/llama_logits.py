"""Run by the interpreter that has llama-cpp-python: last logits of real llama.cpp, by control vector.

Reads from argv[1] {"model": gguf, "prompts": [[id]], "vectors": [gguf or null]}; writes to argv[2]
the logits [vector][prompt][vocab]. Control vectors are read as llama.cpp's own loader does (its
Python package leaves that function out): direction.N goes to row N - 1 of a buffer that llama.cpp
is told begins at layer 1.
"""

import ctypes
import importlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np


def steer(api, context, path: str | None, width: int, layers: int) -> None:
    if path is None:
        assert api.llama_set_adapter_cvec(context, None, 0, width, 1, layers) == 0
        return
    buffer = np.zeros((layers, width), np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        number = int(tensor.name.split(".")[1])
        assert number >= 1 and tensor.data.dtype == np.float32 and tensor.data.shape == (width,)
        buffer[number - 1] = tensor.data
    data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(context, data, buffer.size, width, 1, layers) == 0


def main() -> None:
    api = importlib.import_module("llama_cpp")
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = api.Llama(asked["model"], n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    context = model.ctx
    width, layers = model.n_embd(), api.llama_model_n_layer(model.model)
    found = []
    for vector in asked["vectors"]:
        steer(api, context, vector, width, layers)
        rows = []
        for prompt in asked["prompts"]:
            model.reset()
            model.eval(prompt)
            rows.append(np.array(model.scores[len(prompt) - 1], dtype=np.float32).tolist())
        found.append(rows)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
