"""The best slots that a descent has scored and not gone on from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


class Buffer:
    """At most `size` different slots, the best first.

    Attributes:
        size: How many are kept.
        entries: (loss, ids), ascending; equal losses in the order of the ids.
    """

    def __init__(self, size: int, entries: Iterable[tuple[float, Sequence[int]]] = ()) -> None:
        """Start with some entries."""
        self.size = size
        self.entries: list[tuple[float, tuple[int, ...]]] = []
        for loss, ids in entries:
            self.push(loss, ids)

    def push(self, loss: float, ids: Sequence[int]) -> None:
        """Take a slot in where it is among the best."""
        entry = (float(loss), tuple(ids))
        if all(held != entry[1] for _, held in self.entries):
            self.entries = sorted([*self.entries, entry])[: self.size]

    def pop(
        self, without: Collection[tuple[int, ...]] = ()
    ) -> tuple[float, tuple[int, ...]] | None:
        """Take out the best one that is not in `without`; None where there is none left."""
        for entry in self.entries:
            if entry[1] not in without:
                self.entries.remove(entry)
                return entry
        return None

    def worst(self) -> float:
        """The loss a newcomer has to beat; infinite while there is room."""
        return self.entries[-1][0] if len(self.entries) >= self.size else float("inf")

    def to_list(self) -> list[list[object]]:
        """As JSON: [[loss, [ids]], ...]."""
        return [[loss, list(ids)] for loss, ids in self.entries]
