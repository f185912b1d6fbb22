"""An engine by name; what needs an extra is only imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.checks import choice
from trimtab.engine.local import Engine
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.model import LanguageModel

ENGINES = ("local", "ray", "vllm")


def open_engine(
    name: str, lm: LanguageModel, *, address: str | None = None, workers: int | None = None
) -> Engine:
    """Return an engine; used as a context manager, it lets go of its processes.

    Args:
        name: `local`, `ray` (independent pieces on workers) or `vllm` (answers by vLLM).
        lm: a model that `trimtab.load` loaded.
        address: of a Ray cluster; None starts one on this machine.
        workers: how many of them hold the model at a time; as many as the machine has cores (or
            GPUs, for a model that is on one) when None.

    Raises:
        TrimtabError: No such engine, an extra that is missing, or an option of another engine.
    """
    choice("engine", name, ENGINES)
    if name != "ray" and (address is not None or workers is not None):
        raise TrimtabError(
            asked=f"the engine {name} with an address or a number of workers",
            found="an engine that has none",
            advice="use them with --engine ray",
        )
    if name == "local":
        return Engine(lm)
    if name == "ray":
        module = _extra("ray", "trimtab.engine.ray_engine")
        return module.RayEngine(lm, address=address, workers=workers)
    return _extra("vllm", "trimtab.engine.vllm_engine").VllmEngine(lm)


def _extra(package: str, module: str) -> Any:
    """Import a module of ours that needs a package of somebody else."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise TrimtabError(
            asked=f"the engine {package}",
            found=f"no package {error.name}",
            advice=f"install the extra: pip install 'trimtab[{package}]'",
        ) from error
    return importlib.import_module(module)
