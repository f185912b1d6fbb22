"""Run by the interpreter that has llama-cpp-python: last logits of real llama.cpp, by control vector.

Reads from argv[1] {"model": gguf, "prompts": [[id]], "vectors": [file of floats or null]}; writes
to argv[2] the logits [vector][prompt][vocab]. The floats are what llama.cpp's loader made of a
GGUF file; as in llama.cpp's own start, they are for the blocks from 1 on.
"""

import ctypes
import importlib
import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    api = importlib.import_module("llama_cpp")
    asked = json.loads(Path(sys.argv[1]).read_text())
    found = []
    for vector in asked["vectors"]:
        # Each has its own context: rows that a shorter vector lacks keep the one before's values.
        model = api.Llama(
            asked["model"],
            n_ctx=512,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
        )
        if vector is not None:
            held = np.fromfile(vector, np.float32)
            data = held.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            last = api.llama_model_n_layer(model.model)
            failed = api.llama_set_adapter_cvec(model.ctx, data, held.size, model.n_embd(), 1, last)
            assert failed == 0, vector
        rows = []
        for prompt in asked["prompts"]:
            model.reset()
            model.eval(prompt)
            rows.append(np.array(model.scores[len(prompt) - 1], dtype=np.float32).tolist())
        found.append(rows)
        model.close()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
