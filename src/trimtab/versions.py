"""The versions that figures depend on, for the record of a run."""

from __future__ import annotations

import platform
from importlib import metadata

from trimtab import __version__


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    libraries = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "trimtab": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in libraries},
    }
