"""Several vectors that are one lever: on together, at one strength."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True, eq=False)
class Together:
    """Vectors that are switched on in order, and put at a strength together.

    Attributes:
        vectors: the outermost first.
        name: short name, used in tables.

    Raises:
        TrimtabError: no vectors.
    """

    vectors: tuple[VectorSteering, ...]
    name: str = "together"

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.vectors:
            raise TrimtabError(f"the lever {self.name}", "no vectors", "give at least one")

    @property
    def strength(self) -> float:
        """That of the first."""
        return self.vectors[0].strength

    @property
    def label(self) -> str:
        """Name and strength."""
        return f"{self.name} m={self.strength:+g}"

    def at(self, strength: float) -> Together:
        """Return the same vectors, all of them at another strength."""
        return Together(tuple(vector.at(strength) for vector in self.vectors), self.name)

    @contextmanager
    def on(self, lm: LanguageModel) -> Iterator[None]:
        """Switch all of them on inside a `with` block."""
        with ExitStack() as stack:
            for vector in self.vectors:
                stack.enter_context(vector.on(lm))
            yield
