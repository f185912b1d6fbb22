"""Steering handed to other programs: llama.cpp, PEFT, the evaluation harness, the hub.

Each format holds less than a steering file does; what it cannot hold is refused by name. The
packages that read these formats are extras and are imported only when they are needed.
"""

from trimtab.export.gguf import read_gguf, write_gguf
from trimtab.export.hub import push
from trimtab.export.lm_eval import steered_lm, write_lm_eval
from trimtab.export.peft import write_peft

__all__ = ["push", "read_gguf", "steered_lm", "write_gguf", "write_lm_eval", "write_peft"]
