"""What a discrete prompt may hold: a mask over the vocabulary, and a count of what is violated.

What one token breaks alone is excluded by construction (`Bound.allowed`); what only the whole slot
shows (a word in two tokens, too much of the reference, text that comes back as other tokens) is
counted, so that a repair has something to lower (`Bound.violations`). A slot is legal at 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, islice

import torch
from torch import Tensor

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.generation import end_ids
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.rows import PromptRow, Slot, round_trips, slot_text
from trimtab.prompts.task.words import Words, fold

CHARSETS = ("ascii", "printable", "any")
BROKEN = "\ufffd"  # what bytes that are no character decode to
KINDS = ("tokens", "charset", "words", "overlap", "edits", "chars", "round_trip")
_MEMORY = 200_000  # slots remembered
_TRIES = 256  # draws of a random slot


@dataclass(frozen=True)
class Constraints:
    """What a slot may hold. Special tokens (bos, end, pad, roles, all added ones) never.

    Attributes:
        words: Banned words, as letters of the decoded text (see `trimtab.prompts.task.words`).
        whole_words: Whether "concatenate" is no "cat"; a search may then write "catslea".
        tokens: Banned tokens: ids, or strings that stand for every token of that text, white space
            at its ends, case and accents aside.
        charset: `ascii` (printable ASCII), `printable` (what Unicode calls so) or `any`.
        reference: Token ids of the prompt to be unlike.
        max_overlap: Largest share of the slot's tokens that the reference may hold too. Here and in
            `min_edits` tokens are compared by their text as in `tokens`: "Cats" is " cats".
        min_edits: Least edit distance from the reference, in tokens (Levenshtein).
        max_chars: Most characters of the slot's text.
        round_trip: Whether the slot's text must come back as the slot's tokens in every row.
    """

    words: tuple[str, ...] = ()
    tokens: tuple[int | str, ...] = ()
    charset: str = "ascii"
    reference: tuple[int, ...] = ()
    max_overlap: float | None = None
    min_edits: int | None = None
    max_chars: int | None = None
    round_trip: bool = True
    whole_words: bool = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        choice("charset", self.charset, CHARSETS)
        Words(self.words)
        if isinstance(self.tokens, str):
            raise TrimtabError(
                f"the banned tokens {self.tokens!r}", "one string", f"give ({self.tokens!r},)"
            )
        limits = {"min_edits": self.min_edits, "max_chars": self.max_chars}
        wrong = [f"{name}={value}" for name, value in limits.items() if value and value < 0]
        if self.max_overlap is not None and not 0 <= self.max_overlap <= 1:
            wrong.append(f"max_overlap={self.max_overlap}")
        if wrong:
            raise TrimtabError(
                "constraints on a prompt", ", ".join(wrong), "give a share from 0 to 1, counts >= 0"
            )
        if not self.reference and (self.max_overlap is not None or self.min_edits):
            raise TrimtabError(
                "a prompt unlike its reference", "no reference", "give its token ids"
            )

    def bind(self, lm: LanguageModel, rows: Sequence[PromptRow]) -> Bound:
        """Compile for a model and the rows in which a slot stands.

        Raises:
            TrimtabError: No token left.
        """
        return Bound(self, lm, rows)


class Bound:
    """Constraints of one model and one set of rows; what was once checked is remembered.

    Attributes:
        constraints: What was bound.
        lm: The model.
        rows: Where a slot stands.
        allowed: True for tokens that break nothing alone, bool `[vocab]` on the CPU; as long as the
            model's embedding.
        pool: The allowed tokens' ids `[allowed]`, ascending.
    """

    def __init__(self, constraints: Constraints, lm: LanguageModel, rows: Sequence[PromptRow]) -> None:
        """Look at every token alone."""
        self.constraints, self.lm, self.rows = constraints, lm, list(rows)
        self._words = Words(constraints.words, constraints.whole_words)
        self._cheap: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._returns: dict[tuple[int, ...], bool] = {}
        size = next(lm.model.get_input_embeddings().parameters()).shape[0]
        known = min(size, len(lm.tokenizer))
        texts = [self.text([token]) for token in range(known)]
        self._keys = [_key(text) for text in texts] + [""] * (size - known)
        self._banned = self._banned_tokens(size, known, texts)
        self._reference = [self._key_of(token) for token in constraints.reference]
        fine = [
            token not in self._banned and self._foreign(text) == 0 and not self._words.found(text)
            for token, text in enumerate(texts)
        ]
        self.allowed: Tensor = torch.tensor(fine + [False] * (size - known))
        self.pool = self.allowed.nonzero()[:, 0]
        if not len(self.pool):
            raise TrimtabError(
                "a prompt within the constraints", "no token that is allowed", "ban less"
            )

    def text(self, slot: Sequence[int]) -> str:
        """The text of a slot."""
        return slot_text(self.lm, slot)

    def legal(self, slots: Sequence[Sequence[int]]) -> list[bool]:
        """Tell which slots violate nothing; texts are tokenized only where all else is fine."""
        fine = [not any(self._counts(slot)) for slot in slots]
        returns = iter(self._back(list(compress(slots, fine))))
        return [good and next(returns) for good in fine]

    def first_legal(
        self,
        candidates: Iterable[Slot],
        count: int,
        without: Collection[Slot] = (),
        depth: int = 16,
    ) -> list[Slot]:
        """The first `count` legal candidates of an order: what is filtered out is refilled from below.

        Looks at no more than `depth` times `count`.
        """
        found: list[Slot] = []
        order, seen = iter(candidates), set(without)
        for _ in range(depth):
            chunk = list(islice(order, count))
            new = [slot for slot in dict.fromkeys(chunk) if slot not in seen]
            seen.update(new)
            found += [slot for slot, fine in zip(new, self.legal(new), strict=True) if fine]
            if len(found) >= count or not chunk:
                break
        return found[:count]

    def random_slot(self, length: int, generator: torch.Generator) -> Slot:
        """Draw allowed tokens, a legal sequence where one is met in a few draws."""
        drawn = torch.randint(len(self.pool), (_TRIES, length), generator=generator)
        slots = [tuple(line) for line in self.pool[drawn].tolist()]
        return next(iter(self.first_legal(slots, 1, depth=_TRIES)), slots[0])

    def violations(self, slots: Sequence[Sequence[int]]) -> list[int]:
        """How much each slot violates, the sum over `KINDS`; 0 is legal.

        That is: banned tokens, characters outside the charset, banned words, tokens of the
        reference in excess, edits missing, characters in excess, and 1 where a row does not give
        the tokens back.
        """
        pairs = zip(self.cheap(slots), self._back(slots), strict=True)
        return [count + (not good) for count, good in pairs]

    def cheap(self, slots: Sequence[Sequence[int]]) -> list[int]:
        """The violations without the round trip."""
        return [sum(self._counts(slot)) for slot in slots]

    def explain(self, slot: Sequence[int]) -> dict[str, int]:
        """The violations of one slot by kind, those that are not zero."""
        counts = (*self._counts(slot), int(not self._back([slot])[0]))
        return {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}

    def strayed(self, slot: Sequence[int]) -> int:
        """How many edits the tokens of the slot's text are away from the slot's tokens.

        The round trip says yes or no; this says how near a repair is. The text is taken alone.
        """
        encode = self.lm.tokenizer(
            self.text(slot),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return distance(list(encode["input_ids"]), list(slot))

    def _back(self, slots: Sequence[Sequence[int]]) -> list[bool]:
        if not self.constraints.round_trip:
            return [True] * len(slots)
        wanted = [tuple(slot) for slot in slots]
        new = [slot for slot in dict.fromkeys(wanted) if slot not in self._returns]
        if len(self._returns) > _MEMORY:
            self._returns = {slot: self._returns[slot] for slot in wanted if slot in self._returns}
        # Text that is no characters cannot come back, and is not worth a call of the tokenizer.
        whole = [slot for slot in new if BROKEN not in self.text(slot)]
        self._returns.update(dict.fromkeys(new, False))
        self._returns.update(zip(whole, round_trips(self.lm, whole, self.rows), strict=True))
        return [self._returns[slot] for slot in wanted]

    def _counts(self, slot: Sequence[int]) -> tuple[int, ...]:
        """Violations by kind, all but the last of `KINDS`."""
        ids = tuple(slot)
        if ids not in self._cheap:
            if len(self._cheap) > _MEMORY:
                self._cheap.clear()
            self._cheap[ids] = self._count(ids)
        return self._cheap[ids]

    def _count(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        limits, text = self.constraints, self.text(ids)
        keys = [self._key_of(token) for token in ids]
        overlap, edits, chars = 0, 0, 0
        if limits.max_overlap is not None:
            shared = sum(key in self._reference for key in keys)
            overlap = max(0, shared - int(limits.max_overlap * len(ids) + 1e-9))
        if limits.min_edits:
            edits = max(0, limits.min_edits - distance(keys, self._reference))
        if limits.max_chars is not None:
            chars = max(0, len(text) - limits.max_chars)
        banned = sum(token in self._banned for token in ids)
        return banned, self._foreign(text), len(self._words.found(text)), overlap, edits, chars

    def _banned_tokens(self, size: int, known: int, texts: list[str]) -> frozenset[int]:
        tokenizer = self.lm.tokenizer
        banned = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *end_ids(self.lm)}
        named = {_key(item) for item in self.constraints.tokens if isinstance(item, str)}
        banned |= {item for item in self.constraints.tokens if not isinstance(item, str)}
        banned |= {
            token for token in range(known) if not texts[token] or self._keys[token] in named
        }
        return frozenset(banned | set(range(known, size)))

    def _foreign(self, text: str) -> int:
        """How many characters are outside the charset; bytes that are no character always are."""
        if self.constraints.charset == "ascii":
            return sum(not " " <= char <= "~" for char in text)
        if self.constraints.charset == "printable":
            return sum(char == BROKEN or not char.isprintable() for char in text)
        return text.count(BROKEN)

    def _key_of(self, token: int) -> str:
        if not 0 <= token < len(self._keys):
            raise TrimtabError(
                f"the token {token}",
                f"a model with {len(self._keys)} embeddings",
                "use ids of the model's own tokenizer",
            )
        return self._keys[token]


def distance(left: Sequence[object], right: Sequence[object]) -> int:
    """The Levenshtein distance of two sequences: least insertions, deletions, replacements."""
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


def _key(text: str) -> str:
    """What two tokens share that are the same to a reader."""
    return fold(text).strip() or text
