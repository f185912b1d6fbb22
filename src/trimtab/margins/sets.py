"""The resolution report: how each readout word became token ids under this model's tokenizer.

Published word lists mix phrases with single tokens, give a leading space to some words only, and
write one apostrophe; what is really read depends on the tokenizer. Nothing of that is silent here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.readout import (
    ReadoutTokens,
    Spelling,
    readout_tokens,
    spellings,
    token_text,
)
from trimtab.models.model import LanguageModel
from trimtab.results.tables import ABSENT, Printable, Table

USED, DUPLICATE, COLLISION, NOTHING = "used", "duplicate", "collision", "nothing"
LEARNED = "learned"


@dataclass(frozen=True)
class Resolved:
    """One spelling of one word.

    Attributes:
        side: `toward` or `away`.
        word: as the behavior gives it.
        spelling: as it was tokenized.
        pieces: what each of its tokens says; only the first is read.
        token: id that is read; None for nothing.
        status: `used`; `duplicate` of an earlier spelling of the side; `collision` with the other
            side, left out of both; `nothing`.
        note: why, in words; empty where there is nothing to say.
    """

    side: str
    word: str
    spelling: str
    pieces: tuple[str, ...]
    token: int | None
    status: str
    note: str


@dataclass(frozen=True)
class Resolution(Printable):
    """What the words of both sides became.

    Attributes:
        source: `words` of the behavior, or `learned` from first answer tokens.
        tokens: the two sets that are read, and what collided.
        rows: every spelling of every word.
        lost: words of which no spelling is read, `side: word`.
    """

    source: str
    tokens: ReadoutTokens
    rows: tuple[Resolved, ...]
    lost: tuple[str, ...]

    def table(self) -> Table:
        rows = tuple(
            (
                row.side,
                row.word,
                repr(row.spelling),
                " | ".join(row.pieces) or ABSENT,
                ABSENT if row.token is None else str(row.token),
                row.status,
                row.note,
            )
            for row in self.rows
        )
        columns = ("side", "word", "spelling", "tokens", "read", "status", "note")
        return Table("Resolution of the readout words", columns, rows, self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Counts, and the words that are not read at all."""
        sets = self.tokens
        text = f"{len(sets.toward)} toward and {len(sets.away)} away tokens are read"
        said = [f"{text}; {len(sets.collisions)} collide and are left out of both sides"]
        if self.lost:
            said.append("not read at all: " + ", ".join(self.lost))
        return tuple(said)


def resolve(lm: LanguageModel, behavior: Behavior) -> Resolution:
    """Resolve a behavior's readout words and say what became of each spelling.

    Raises:
        TrimtabError: no readout words, or a side with no token of its own.
    """
    tokens = readout_tokens(lm, behavior)
    assert behavior.readout is not None  # readout_tokens refuses that
    rows: list[Resolved] = []
    for side in ("toward", "away"):
        seen: dict[int, str] = {}
        for word in getattr(behavior.readout, side):
            for one in spellings(lm, word):
                rows.append(_row(lm, side, one, tokens, seen))
                if one.token is not None:
                    seen.setdefault(one.token, one.text)
    return Resolution("words", tokens, tuple(rows), _lost(rows))


def of_tokens(tokens: ReadoutTokens) -> Resolution:
    """Report two sets that were given as tokens: there are no words to resolve."""
    rows = tuple(
        Resolved(side, tokens.texts[i], tokens.texts[i], (tokens.texts[i],), i, USED, "a token")
        for side in ("toward", "away")
        for i in getattr(tokens, side)
    )
    return Resolution(LEARNED, tokens, rows, ())


def _row(
    lm: LanguageModel, side: str, one: Spelling, tokens: ReadoutTokens, seen: dict[int, str]
) -> Resolved:
    pieces = tuple(token_text(lm, i) for i in one.ids)
    status, note = USED, ""
    if one.token is None:
        status, note = NOTHING, one.problem
    elif one.token in tokens.collisions:
        status, note = COLLISION, "both sides open with it; left out of both"
    elif one.token in seen:
        status, note = DUPLICATE, f"read already, for {seen[one.token]!r}"
    elif len(pieces) > 1:
        note = f"first of {len(pieces)} tokens: every answer that opens with {pieces[0]!r} counts"
    return Resolved(side, one.word, one.text, pieces, one.token, status, note)


def _lost(rows: list[Resolved]) -> tuple[str, ...]:
    words = dict.fromkeys((row.side, row.word) for row in rows)
    read = {(row.side, row.word) for row in rows if row.status in (USED, DUPLICATE)}
    return tuple(f"{side}: {word}" for side, word in words if (side, word) not in read)
