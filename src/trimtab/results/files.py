"""A file or folder appears whole or not at all: made beside its place, then renamed to it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from filelock import FileLock

from trimtab.errors import TrimtabError


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; when the block ends well it is renamed to `path`.

    Raises:
        TrimtabError: the folder cannot be made or written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TrimtabError(
            asked=f"to write {target}",
            found=str(error),
            advice="choose a file in a folder you may write",
        ) from error


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder to fill; when the block ends well it becomes `target`, else it is removed.

    What a killed run left beside `target` is removed first. A folder that another process is
    filling is left alone: it was locked before it was made, and its lock dies with its process.

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
    lock = _lock(building)
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            building.mkdir()
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
        shutil.rmtree(building, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the half-made folders of killed runs for the same target; return them."""
    removed = []
    for path in sorted(target.parent.glob(f".{escape(target.name)}.*.partial")):
        lock = _lock(path)
        try:
            with lock:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # somebody holds it
            continue
        Path(lock.lock_file).unlink(missing_ok=True)
        removed.append(path)
    return removed


def _lock(folder: Path) -> FileLock:
    """The lock of a folder in the making, which nobody waits for."""
    return FileLock(f"{folder}.lock", blocking=False)


def _rename(building: Path, target: Path) -> None:
    try:
        os.rename(building, target)  # replaces an empty folder in one step where the system can
    except OSError:
        if target.is_dir():
            target.rmdir()  # empty, as checked
        os.rename(building, target)


def _sync(folder: Path) -> None:
    """Make names durable; not every system can open a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
