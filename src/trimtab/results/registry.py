"""Names that users type and what they stand for; other packages add theirs by entry points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from trimtab.errors import TrimtabError, nearest

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """What is known under a name, registered here or named by an installed package.

    A package adds a function without a change here by an entry point `name = "package.module:function"`
    in `group`; it is imported when the name is first used.
    """

    def __init__(
        self,
        what: str,
        *,
        make: Callable[..., T] = lambda name, function: function,
        group: str = "",
        later: Mapping[str, str] | None = None,
    ) -> None:
        """Begin empty.

        Args:
            what: one of these in words, for errors.
            make: turns (name, function, **facts) into what is kept.
            group: of the entry points; none when empty.
            later: name -> "module:function", imported when it is first used.
        """
        self._what, self._make, self._group = what, make, group
        self._later = dict(later or {})
        self._kept: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *, aliases: Sequence[str] = (), **facts: Any) -> Callable[[F], F]:
        """Register the decorated function under a name and its aliases."""

        def add(function: F) -> F:
            self._kept[name] = self._make(name, function, **facts)
            self._aliases.update(dict.fromkeys(aliases, name))
            return function

        return add

    def get(self, name: str, of: str = "") -> T:
        """Return what a name or an alias stands for; `of` says in errors who asked for it.

        Raises:
            TrimtabError: an unknown name, or one whose package cannot be imported.
        """
        name = self._aliases.get(name, name)
        if name not in self._kept:
            asked = f"the {self._what} {name!r}{of and ' of '}{of}"
            place = self._elsewhere().get(name)
            if place is None:
                raise TrimtabError(asked, f"no such {self._what}", nearest(name, tuple(self)))
            try:
                function = resolve_name(place)
            except (ImportError, AttributeError) as error:
                advice = "see to the package that announces it"
                raise TrimtabError(asked, f"{place} cannot be imported: {error}", advice) from error
            if name not in self._kept:  # its module may have registered it
                self.register(name)(function)
        return self._kept[name]

    __getitem__ = get

    def __delitem__(self, name: str) -> None:
        self._kept.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return self._aliases.get(str(name), name) in tuple(self)

    def __iter__(self) -> Iterator[str]:
        """Go over the names, sorted, without aliases."""
        return iter(sorted({*self._kept, *self._elsewhere()}))

    def _elsewhere(self) -> dict[str, str]:
        found = entry_points(group=self._group) if self._group else ()
        return {entry.name: entry.value for entry in found} | self._later


@dataclass(frozen=True)
class Named:
    """A registered function `(task, *, option=default, ...)`."""

    name: str
    function: Callable[..., Any]

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check(self, what: str, options: Mapping[str, Any], page: str) -> None:
        """Refuse an option that the function does not have; `page` of docs/methods describes them."""
        unknown = [option for option in options if option not in self.options]
        if unknown:
            raise TrimtabError(
                f"the option {unknown[0]!r} of the {what} {self.name!r}",
                f"the options {', '.join(self.options) or 'none'}",
                f"see docs/methods/{page}.md",
            )
