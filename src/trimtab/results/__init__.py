"""How a figure is bounded, shown and kept."""

from collections.abc import Callable
from itertools import count
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]  # steps done, steps in all


def stepper(progress: Progress | None, steps: int) -> Callable[[], None]:
    """Return what to call after each of so many steps; it tells `progress`."""
    done = count(1)
    return lambda: None if progress is None else progress(next(done), steps)
