"""Coherence: has the text fallen apart? One minus penalties, in [0, 1], for any language.

Each penalty grows linearly from 0 at "free" to 1 at "full":

- empty: no word at all; always full.
- stutter: share of words equal to the word before, two such pairs at least; 0.05 to 0.40.
- chant: share of letters in a chunk said three times without a space; 0.30 to 0.70.
- words: share of words already used, from 4 words on; f(n) to f(n) + 0.50.
- phrases: share of 3-word phrases already used; 0.20 to 0.75.
- squeezable: zlib ratio below l(b), from 60 bytes on; l(b) to l(b) / 2.
- noise: zlib ratio above h(b), from 200 bytes on, Latin text only; h(b) to h(b) + 0.12.
- symbols: share of characters that are neither letters, digits nor spaces, the first 3 free;
  0.30 to 0.60.

With n words and b bytes: f(n) = 0.25 + 0.075 log2(n/6), l(b) = 0.50 - 0.09 log10(b/100),
h(b) = max(0.60, 0.84 - 0.27 log10(b/200)); the zlib ratio leaves out its 8 bytes of framing.
The bounds were set at the 99th to 99.9th percentile of 3,133 English paragraphs and 7,937
sentences of a programming textbook and of software licenses; 99.7 % of them score 0.9 or more,
the others are rules and underlines. Fluent nonsense and words drawn at random pass: no
statistic of this kind sees them.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.results.registry import Registry

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior

Coherence = Callable[[Sequence[str]], list[float]]
CoherenceFactory = Callable[["Behavior", Mapping[str, object]], Coherence]

# Scripts written without spaces count each character as a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+(?:['’]\w+)*"
)
_CHANT = re.compile(r"([^\W\d_]{1,12}?)\1{2,}", re.IGNORECASE)


COHERENCES: Registry[CoherenceFactory] = Registry(
    "coherence",
    group="trimtab.coherence",
    later={"harbor": "trimtab.harbor.scoring:harbor_coherence"},
)
register_coherence = COHERENCES.register


def coherence_for(behavior: Behavior) -> Coherence:
    """Build the coherence scorer that the behavior names, `text` when it names none.

    Returns:
        A function from answers to one number in [0, 1] each, 1 for sound text.

    Raises:
        TrimtabError: for an unknown kind or a scorer that leaves [0, 1].
    """
    spec = behavior.coherence
    kind, options = ("text", {}) if spec is None else (spec.kind, spec.options)
    scorer = COHERENCES.get(kind, f"the behavior {behavior.name!r}")(behavior, options)

    def run(answers: Sequence[str]) -> list[float]:
        values = [float(value) for value in scorer(answers)]
        if len(values) != len(answers) or not all(0 <= value <= 1 for value in values):
            raise TrimtabError(
                asked=f"the coherence {kind!r} of {len(answers)} answers",
                found=f"{len(values)} values, not all of them from 0 to 1",
                advice="return one number from 0 to 1 per answer, in order",
            )
        return values

    return run


@register_coherence("text")
def text(behavior: Behavior, options: Mapping[str, object]) -> Coherence:
    """Score by statistics of the text alone (module docstring); takes no options."""
    check_options("coherence 'text'", options, set())
    return lambda answers: [text_coherence(answer) for answer in answers]


def check_options(what: str, options: Mapping[str, object], known: set[str]) -> None:
    """Refuse options that a judge or a coherence scorer does not have."""
    unknown = sorted(set(options) - known)
    if unknown:
        raise TrimtabError(
            asked=f"the options {', '.join(unknown)} of the {what}",
            found=f"the options {', '.join(sorted(known)) or 'none'}",
            advice="check the spelling" if known else "leave the options out",
        )


def text_coherence(answer: str) -> float:
    """Return one minus the sum of `penalties`, not below 0."""
    return max(0.0, 1.0 - sum(penalties(answer).values()))


def penalties(answer: str) -> dict[str, float]:
    """Return every penalty of the table above by name, each in [0, 1]."""
    stripped = answer.strip()
    words = [word.casefold() for word in _WORD.findall(stripped)]
    if not words:
        return {"empty": 1.0}
    n = len(words)
    pairs = sum(a == b for a, b in zip(words, words[1:], strict=False))
    phrases = list(zip(words, words[1:], words[2:], strict=False))
    letters = sum(c.isalpha() for c in stripped)
    chanted = sum(len(match.group()) for match in _CHANT.finditer(stripped))
    symbols = sum(not c.isalnum() and not c.isspace() for c in stripped)
    free_words = 0.25 + 0.075 * math.log2(max(n, 6) / 6)
    low, high = _zlib_penalties(stripped)
    return {
        "stutter": _ramp(pairs / (n - 1), 0.05, 0.40) if pairs >= 2 else 0.0,
        "chant": _ramp(chanted / max(letters, 1), 0.30, 0.70),
        "words": _ramp(1 - len(set(words)) / n, free_words, free_words + 0.50) if n > 3 else 0.0,
        "phrases": _ramp(1 - len(set(phrases)) / len(phrases), 0.20, 0.75) if phrases else 0.0,
        "squeezable": low,
        "noise": high,
        "symbols": _ramp((symbols - 3) / len(stripped), 0.30, 0.60),
    }


def _zlib_penalties(stripped: str) -> tuple[float, float]:
    raw = stripped.encode("utf-8", errors="replace")
    size = len(raw)
    if size < 60:
        return 0.0, 0.0
    ratio = (len(zlib.compress(raw, 9)) - 8) / size
    low = 0.50 - 0.09 * math.log10(size / 100)
    squeezable = _ramp(low - ratio, 0.0, low / 2)
    latin = sum(byte < 128 for byte in raw) / size >= 0.8
    if size < 200 or not latin:
        return squeezable, 0.0
    high = max(0.60, 0.84 - 0.27 * math.log10(size / 200))
    return squeezable, _ramp(ratio - high, 0.0, 0.12)


def _ramp(value: float, free: float, full: float) -> float:
    return min(1.0, max(0.0, (value - free) / (full - free)))
