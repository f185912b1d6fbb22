"""How a figure is bounded, shown and kept."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]  # steps done, steps in all
