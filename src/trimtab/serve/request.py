"""What a request writes under `steer`, and the vectors, strengths and scopes that it comes to.

    "mood"   "mood:1.5"   "mood:-2@generated"   ["mood:1.5", "refusal@prompt"]   {"mood": 1.5, "refusal@prompt": 2}

A name alone takes the strength and the scope of its file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple

from trimtab.errors import TrimtabError
from trimtab.serve.registry import VectorRegistry
from trimtab.serve.tokens import SCOPES, Term
from trimtab.steering.scope import Scope

KEY = "steer"
# Where the plugin leaves the terms for the engine; whatever a request puts there is replaced.
RESOLVED = "trimtab.terms"
_FORM = re.compile(r"(?P<name>[^:@]+)(?::(?P<strength>[^:@]*))?(?:@(?P<scope>.*))?", re.DOTALL)
_SHOWN = 60


def asked_for(extra: Mapping[str, object] | None) -> object:
    """Return what stands under `steer`, or None.

    Raises:
        TrimtabError: A key that looks like it but is another: it would steer nothing, silently.
    """
    for key in extra or {}:
        lowered = str(key).lower()
        if key not in (KEY, RESOLVED) and lowered.startswith(("steer", "trimtab")):
            raise TrimtabError(
                asked=f"a request with {_short(key)}",
                found=f"no such key; steering is chosen by {KEY!r}",
                advice=f'write "{KEY}": "NAME:STRENGTH", or a list of them',
            )
    return (extra or {}).get(KEY)


def terms(extra: Mapping[str, object] | None, registry: VectorRegistry) -> tuple[Term, ...]:
    """Work out the terms of a request; strength 0 is none.

    Args:
        extra: The request's `extra_args` (`vllm_xargs` over HTTP).
        registry: What the server has.

    Raises:
        TrimtabError: A name, strength or scope that cannot be served.
    """
    found = []
    for name, strength, scope in _written(asked_for(extra)):
        entry = registry.entry(name)
        m = entry.strength if strength is None else _strength(name, strength)
        if abs(m) > entry.largest:
            raise TrimtabError(
                asked=f"{name!r} at strength {m:g}",
                found="more than the model's numbers hold",
                advice=f"stay within {entry.largest:.3g}; useful strengths are near 1",
            )
        where = entry.scope if scope is None else _scope(name, scope)
        if m != 0.0:
            found.append(Term(entry.column, m, where, entry.digest))
    return tuple(found)


def pack(found: Sequence[Term]) -> list[list[object]]:
    """The terms as plain lists, which cross to the engine's processes."""
    return [list(astuple(term)) for term in found]


def unpack(extra: Mapping[str, object] | None) -> tuple[Term, ...]:
    """The terms that `pack` left in a request."""
    packed = (extra or {}).get(RESOLVED) or ()
    assert isinstance(packed, (list, tuple))
    return tuple(Term(*parts) for parts in packed)


def _written(value: object) -> Iterator[tuple[str, object, object]]:
    """(name, strength, scope) of each term as it was written; None where nothing was said."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for text, strength in value.items():
            name, twice, scope = _parts(text)
            if twice is not None:
                raise _misshapen(value)
            yield name, strength, scope
        return
    for text in value if isinstance(value, (list, tuple)) else [value]:
        yield _parts(text)


def _parts(text: object) -> tuple[str, str | None, str | None]:
    match = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise _misshapen(text)
    return match["name"].strip(), match["strength"], match["scope"]


def _misshapen(value: object) -> TrimtabError:
    return TrimtabError(
        asked=f"to steer with {_short(value)}",
        found="something that names no vector",
        advice='write "NAME", "NAME:STRENGTH" or "NAME:STRENGTH@SCOPE", or a list of them',
    )


def _strength(name: str, given: object) -> float:
    m = math.nan
    if isinstance(given, (str, int, float)) and not isinstance(given, bool):
        with suppress(ValueError, OverflowError):
            m = float(given)
    if not math.isfinite(m):
        raise TrimtabError(
            asked=f"{name!r} at strength {_short(given)}",
            found="something that is not a finite number",
            advice="give a number, such as 1.5 or -1",
        )
    return m


def _scope(name: str, given: object) -> str:
    scope = Scope.parse(str(given).strip())
    if scope.name in SCOPES:
        return scope.name
    reason = (
        "a server sees tokens, and not where the user's text ends"
        if scope.name == "post_instruction"
        else "a server steers by what a token is, not by its number"
    )
    raise TrimtabError(f"{name!r} over {scope}", reason, f"use one of {', '.join(SCOPES)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
