"""Steering inside vLLM: vectors registered at start, chosen by each request by name and strength.

The plugin (`vllm.general_plugins`) does nothing until `TRIMTAB_STEER` names a folder of steering
files, as `trimtab serve` does. `engine`, `worker` and `plugin` know vLLM, and import it when they are
called; the other modules need only torch.
"""

from trimtab.serve.registry import Served, VectorRegistry
from trimtab.serve.request import terms
from trimtab.serve.tokens import SCOPES, Term

__all__ = ["SCOPES", "VectorRegistry", "Served", "Term", "terms"]
