"""What a `with` block opens for the thread or asyncio task that entered it, and for nobody else.

A context variable holds the open entries as a tuple, innermost last. A new thread starts with none;
an asyncio task, `asyncio.to_thread` and `contextvars.copy_context().run` take along what is open where
they begin. An entry is taken out by identity, so blocks may be left in another order than entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class OpenEntry:
    """One open block: an attribute of an object that has another value inside it."""

    owner: object
    name: str
    value: Any


_OPEN: ContextVar[tuple[OpenEntry, ...]] = ContextVar("trimtab_open", default=())


def is_open(entry: OpenEntry) -> bool:
    """Whether the running code is inside the block."""
    return entry in _OPEN.get()


def names() -> set[str]:
    """What open blocks change, of whatever object."""
    return {entry.name for entry in _OPEN.get()}


def values(owner: object, name: str) -> list[Any]:
    """The values that open blocks give an attribute, innermost last."""
    return [e.value for e in _OPEN.get() if e.owner is owner and e.name == name]


def enter(entry: OpenEntry) -> None:
    """Open a block."""
    _OPEN.set((*_OPEN.get(), entry))


def leave(entry: OpenEntry) -> bool:
    """Close a block, and say whether it was open here."""
    before = _OPEN.get()
    _OPEN.set(tuple(other for other in before if other is not entry))
    return entry in before


@contextmanager
def opened(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value inside the block."""
    entry = OpenEntry(owner, name, value)
    enter(entry)
    try:
        yield
    finally:
        leave(entry)
