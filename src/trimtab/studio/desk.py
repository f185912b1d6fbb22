"""One visitor's place: what is on it, and the folder that its files are handed out from."""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from trimtab.errors import TrimtabError
from trimtab.studio.workshop import Workbench


class Turns:
    """Which of a visitor's moves is the last one: they may overlap and arrive out of order."""

    def __init__(self) -> None:
        self._latest, self._taken = -math.inf, time.monotonic()

    def take(self, at: float) -> Callable[[], bool]:
        """Note a move made at a time of the visitor's clock; return whether it is still the last."""
        self._latest, self._taken = max(self._latest, at), time.monotonic()
        return lambda: at >= self._latest

    def idle(self) -> float:
        """Return the seconds since a move was last noted."""
        return time.monotonic() - self._taken


@dataclass(frozen=True, eq=False)
class Desk:
    """A value, so that what one visitor changes cannot reach another.

    The folder is named by a secret, which is all that its files' addresses are protected by.
    """

    folder: Path
    bench: Workbench | None = None
    turns: Turns = field(default_factory=Turns)

    @property
    def ready(self) -> Workbench:
        """The bench, which has to be there."""
        if self.bench is None:
            raise TrimtabError(
                "to steer", "no vector yet", "find one, or open a steering file, under 1 above"
            )
        return self.bench

    def url(self, path: Path) -> str:
        """Return the address of a file in the folder."""
        inside = path.relative_to(self.folder.parent).as_posix()
        return f"/made/{quote(inside)}"


def new_desk(root: Path) -> Desk:
    """Make an empty desk in a folder that nobody can guess."""
    folder = root / secrets.token_urlsafe(24)
    folder.mkdir(mode=0o700)
    return Desk(folder)


def clear(desk: Desk | None) -> None:
    """Remove what a visitor who left had made."""
    if desk is not None:
        shutil.rmtree(desk.folder, ignore_errors=True)
