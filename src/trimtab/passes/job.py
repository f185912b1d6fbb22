"""What independent pieces of work need besides their own arguments, and how a worker gets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar
from uuid import uuid4

from trimtab.models.model import LanguageModel
from trimtab.results.journal import Notes

Held = TypeVar("Held")
Result = TypeVar("Result")
# A piece of work: called with what the job holds, and with notes of the steps finished so far.
Unit: TypeAlias = Callable[[Held, Notes], Result]


@dataclass(frozen=True, eq=False)
class Job(Generic[Held]):
    """One thing that many units work with, such as an evaluator.

    Attributes:
        here: this process's own.
        make: builds the same from a worker's model; it must cross to another process, so it is a
            function of a module, or a `functools.partial` of one.
        key: tells jobs apart, so that a worker builds each of them once.
    """

    here: Held
    make: Callable[[LanguageModel], Held]
    key: str = field(default_factory=lambda: uuid4().hex)
