"""Steering inside vLLM: vectors registered at start, chosen by each request by name and strength.

The plugin (`vllm.general_plugins`) does nothing until `TRIMTAB_STEER` names a folder of steering
files, as `trimtab serve` does. `engine`, `worker` and `plugin`
know vLLM, and import it when they are called; the other modules need only torch.

    registry   the files of the folder: what fits the served model, and what is refused and why
    request    what a request may write, and what it comes to
    tokens     which tokens of a step each scope covers
    step       the weights of a step's tokens, in a buffer that the compiled graph reads
    blocks     the additions to the stream, inside the graph
    prefix     what the prefix cache must tell apart
    engine     what of an engine's configuration can be steered
    worker     where a worker meets them
    plugin     where vLLM meets them all
    launch     stock `vllm serve` with a folder
"""

from trimtab.serve.registry import Registry, Served
from trimtab.serve.request import terms
from trimtab.serve.tokens import SCOPES, Term

__all__ = ["SCOPES", "Registry", "Served", "Term", "terms"]
