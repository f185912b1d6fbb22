"""What this installation can do: versions, device, memory, and what each extra would add."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

from trimtab.results.tables import Printable, Table

# Extra -> (module, what it adds).
EXTRAS = {
    "studio": ("gradio", "the browser app"),
    "peft": ("peft", "adapters: export to PEFT, LoRA as a lever of comparison"),
    "judges": ("vaderSentiment", "judges of mood and language"),
    "vllm": ("vllm", "serving with a vector chosen per request; answers of --engine vllm"),
    "ray": ("ray", "--engine ray: independent work on several processes or machines"),
    "lm-eval": ("lm_eval", "standard tasks under steering"),
    "docs": ("mkdocs", "the documentation site"),
}


@dataclass(frozen=True)
class Extra:
    """One optional part, as in `pip install trimtab[name]`; no version where it is not installed."""

    name: str
    adds: str
    version: str | None


@dataclass(frozen=True)
class Diagnosis(Printable):
    """What this installation can do; no memory where the system does not say, no devices but the CPU.

    `threads` are torch's, `devices` the names of accelerators.
    """

    versions: dict[str, str]
    system: str
    cores: int
    threads: int
    memory_gib: float | None
    devices: tuple[str, ...]
    extras: tuple[Extra, ...]

    def table(self) -> Table:
        """Return what is there and what is not."""
        memory = "unknown" if self.memory_gib is None else f"{self.memory_gib:.0f} GiB"
        rows = [
            *self.versions.items(),
            ("system", self.system),
            ("cores", f"{self.cores}, of which torch uses {self.threads}"),
            ("memory", memory),
            ("accelerators", ", ".join(self.devices) or "none: everything runs on the processor"),
        ]
        rows += [
            (
                f"extra {extra.name}",
                f"{extra.version or 'not installed'}: {extra.adds}"
                + ("" if extra.version else f" (pip install 'trimtab[{extra.name}]')"),
            )
            for extra in self.extras
        ]
        return Table("This installation", ("what", "found"), tuple(rows))


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "trimtab": metadata.version("trimtab"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def diagnose() -> Diagnosis:
    """Look at versions, device and extras; no extra is imported and nothing is loaded."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple GPU (mps)")
    return Diagnosis(
        versions=versions(),
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=_memory(),
        devices=tuple(devices),
        extras=tuple(Extra(name, adds, _version(name, of)) for name, (of, adds) in EXTRAS.items()),
    )


def _version(extra: str, module: str) -> str | None:
    """The version of an extra's package, which may be named after the extra or after its module."""
    if find_spec(module) is None:
        return None
    for name in (extra, module):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "installed"


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # not every system says
        return None
