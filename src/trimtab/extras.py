"""Packages of extras, imported when they are used: nothing needs them before."""

from __future__ import annotations

import importlib
from types import ModuleType

from trimtab.errors import TrimtabError


def extra(module: str, name: str) -> ModuleType:
    """Import the package of an extra.

    Args:
        module: what is imported.
        name: the extra of Trimtab that brings it.

    Raises:
        TrimtabError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrimtabError(
            asked=f"to use the package {module.partition('.')[0]}",
            found=f"it cannot be imported: {error}",
            advice=f"pip install 'trimtab[{name}]'",
        ) from error
