"""An engine by name; what needs an extra is only imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine

ENGINES = ("local", "ray", "vllm")


def open_engine(
    name: str,
    lm: LanguageModel,
    *,
    address: str | None = None,
    workers: int | None = None,
    imports: Sequence[str] = (),
) -> Engine:
    """Return an engine; used as a context manager, it lets go of its processes.

    Args:
        name: `local`, `ray` (independent pieces on workers) or `vllm` (answers by vLLM).
        lm: a model that `trimtab.load` loaded.
        address: of a Ray cluster; None starts one on this machine.
        workers: how many of them hold the model at a time; as many as the machine has cores (or
            GPUs, for a model that is on one) when None.
        imports: modules that workers import first, such as one that registers a judge of your own.

    Raises:
        TrimtabError: No such engine, an extra that is missing, or an option of another engine.
    """
    choice("engine", name, ENGINES)
    if name != "ray" and (address is not None or workers is not None or imports):
        raise TrimtabError(
            asked=f"the engine {name} with an address or a number of workers",
            found="an engine that has none",
            advice="use them with --engine ray",
        )
    if name == "local":
        return Engine(lm)
    if name == "ray":
        if address is None:
            # Read when Ray is imported: a cluster of one machine, which listens on loopback alone.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        module = _extra("ray", "trimtab.engine.ray_engine")
        return module.RayEngine(lm, address=address, workers=workers, imports=imports)
    return _extra("vllm", "trimtab.engine.vllm_engine").VllmEngine(lm)


def _extra(package: str, module: str) -> Any:
    """Import a module of ours that needs a package of somebody else."""
    if importlib.util.find_spec(package) is None:
        raise TrimtabError(
            asked=f"the engine {package}",
            found=f"no package {package}",
            advice=f"install the extra: pip install 'trimtab[{package}]'",
        )
    return importlib.import_module(module)
