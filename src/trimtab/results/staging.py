"""A folder that is there whole or not at all: built beside its place and renamed at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import TrimtabError

_YOUNG = 60.0


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder to fill; when the block ends well it becomes `target`, else it is removed.

    What a killed run left beside `target` is removed first. A folder that another process is
    filling is left alone: it holds a lock that dies with it.

    Raises:
        TrimtabError: something is at `target` already, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrimtabError(
            asked=f"to write a checkpoint to {target}",
            found="something there already",
            advice="name a folder that does not exist yet",
        )
    whole = target.absolute()
    remove_leftovers(whole)
    building = whole.with_name(f".{whole.name}.{secrets.token_hex(4)}.partial")
    lock = -1
    try:
        building.mkdir(parents=True)
        lock = _hold(building)
        yield building
        _sync(building)
        _rename(building, whole)
        _sync(whole.parent)
    except OSError as error:
        raise TrimtabError(
            asked=f"to write a checkpoint to {target}",
            found=str(error),
            advice="see what stands in the way; nothing was left there",
        ) from error
    finally:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(building, ignore_errors=True)


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the half-made folders of killed runs for the same target; return them."""
    removed = []
    if target.parent.is_dir():
        for path in sorted(target.parent.glob(f".{_literal(target.name)}.*.partial")):
            if path.is_dir() and _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


def _literal(name: str) -> str:
    """A name in which a pattern's characters mean themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _hold(folder: Path) -> int:
    """Lock a folder for as long as this process lives; -1 where the system has no such locks."""
    if sys.platform == "win32":
        return -1
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: then nothing is ever taken for abandoned
        pass
    return handle


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock; where there are no locks, nothing is ever taken away."""
    if sys.platform == "win32":
        return False
    import fcntl

    # A run that lives passes in microseconds from making the folder to locking it.
    if not any(folder.iterdir()) and time.time() - folder.stat().st_mtime < _YOUNG:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _rename(building: Path, target: Path) -> None:
    try:
        os.rename(building, target)  # replaces an empty folder in one step where the system can
    except OSError:
        if target.is_dir():
            target.rmdir()  # empty, as checked
        os.rename(building, target)


def _sync(folder: Path) -> None:
    """Make names durable; not every system can open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
