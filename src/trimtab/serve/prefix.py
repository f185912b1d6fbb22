"""What the prefix cache must tell apart: which tokens of a block were steered, how, by what.

A block of the cache holds the keys and values of some tokens, and is known by a hash of the tokens,
of the block before it and of extra keys. Steering adds one extra key to every block that holds a
steered token. So blocks are shared exactly where their contents are equal: between requests with the
same steering, and between all requests before the first steered token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from trimtab.serve.request import pack
from trimtab.serve.tokens import Term, covered

TAG = "trimtab"


def block_key(terms: Sequence[Term], start: int, stop: int, prompt_length: int) -> str | None:
    """The extra key of the block that holds positions [start, stop), or None where nothing is."""
    parts = []
    for term in terms:
        first, last = covered(term.scope, start, stop, prompt_length)
        if first < last:
            parts.append(f"{term.digest}:{term.strength!r}:{first - start}-{last - start}")
    return " ".join(sorted(parts)) or None


def salt(given: str | None, terms: Sequence[Term], prompt_length: int) -> str | None:
    """A salt for caches outside vLLM, which hash tokens their own way and know no extra keys.

    It holds the prompt's length, without which a prompt that repeats a steered answer would be
    taken for that answer. No salt that a request brings equals one made here.
    """
    if not terms and not (given or "").startswith(TAG):
        return given
    text = json.dumps([given, pack(terms), prompt_length if terms else None])
    return f"{TAG}-{hashlib.sha256(text.encode()).hexdigest()}"
