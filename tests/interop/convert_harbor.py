"""llama.cpp's own converter on a checkpoint whose tokenizer it does not know.

It names a BPE's way of splitting text by a hash of its own list and stops at any other. Prompts go
in as ids here, so that name is given; every tensor and every other key is the converter's.

argv: folder of llama.cpp's source, then the converter's own arguments.
"""

import importlib
import runpy
import sys


def main() -> None:
    source = sys.argv.pop(1)
    sys.path[:0] = [source, f"{source}/gguf-py"]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
