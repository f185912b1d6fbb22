"""The gap: how much further up the behavior's readout words stand at the first answer position.

gap = score(toward tokens) - score(away tokens), in nats. With the default aggregator, logsumexp,
it is the log-odds that the answer opens with a toward rather than an away token. It needs one
forward pass and no sampling, so layers can be screened with it; it sees only the answer's first
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Printable, Table

AGGREGATORS = ("logsumexp", "max", "log_odds")
APOSTROPHES = ("'", "\u2019")


@dataclass(frozen=True)
class Spelling:
    """One way to write a readout word, and the token that an answer opening with it begins with.

    Attributes:
        word: as the behavior gives it.
        text: as it was tokenized: with or without a space in front, with one of both apostrophes.
        ids: its tokens.
        token: the first of them; None where the text opens with nothing that tells words apart.
        problem: why there is no token; empty where there is one.
    """

    word: str
    text: str
    ids: tuple[int, ...]
    token: int | None
    problem: str = ""


@dataclass(frozen=True)
class ReadoutTokens(Printable):
    """The first tokens of the readout words.

    Attributes:
        toward: token ids read as the behavior.
        away: token ids read as its opposite.
        collisions: ids that both sides open with; left out of both.
        texts: what each id says.
    """

    toward: tuple[int, ...]
    away: tuple[int, ...]
    collisions: tuple[int, ...]
    texts: dict[int, str]

    def table(self) -> Table:
        """List the tokens of both sides, and those that had to be left out."""
        sides = (("toward", self.toward), ("away", self.away), ("both, left out", self.collisions))
        rows = [(side, str(i), repr(self.texts[i])) for side, ids in sides for i in ids]
        return Table("Readout tokens", ("side", "id", "text"), tuple(rows))


def readout_tokens(lm: LanguageModel, behavior: Behavior) -> ReadoutTokens:
    """Resolve readout words to their first token, with and without a space in front.

    Raises:
        TrimtabError: when the behavior has no readout words, or a side shares all its tokens with
            the other one.
    """
    words = behavior.readout
    if words is None:
        raise TrimtabError(
            asked=f"the readout gap of the behavior {behavior.name!r}",
            found="a behavior without readout words",
            advice="give it readout: toward and away words that its answers open with",
        )
    toward, away = _first_tokens(lm, words.toward), _first_tokens(lm, words.away)
    shared = sorted(toward & away)
    texts = {i: token_text(lm, i) for i in sorted(toward | away)}
    for side, ids in (("toward", toward), ("away", away)):
        if not ids - set(shared):
            raise TrimtabError(
                asked=f"the readout gap of the behavior {behavior.name!r}",
                found=f"no token of its {side} words that the other side does not open with "
                f"(shared: {', '.join(repr(texts[i]) for i in shared) or 'none'})",
                advice="choose words whose first tokens differ",
            )
    return ReadoutTokens(
        tuple(sorted(toward - set(shared))), tuple(sorted(away - set(shared))), tuple(shared), texts
    )


def spellings(lm: LanguageModel, word: str) -> tuple[Spelling, ...]:
    """Return the ways to write a word, each resolved to its first token under this tokenizer."""
    bare = word.strip()
    forms = [bare]
    if any(mark in bare for mark in APOSTROPHES):
        forms = [_with_apostrophe(bare, mark) for mark in APOSTROPHES]
    return tuple(_spelling(lm, word, space + form) for form in forms for space in ("", " "))


def gap(
    lm: LanguageModel,
    behavior: Behavior,
    prompts: Sequence[Prompt],
    aggregator: str = "logsumexp",
) -> Tensor:
    """Return the readout gap of every prompt, float32 `[n]`, toward minus away, in nats.

    Inside `with vector.on(lm):` it is the steered gap.
    """
    tokens = readout_tokens(lm, behavior)
    return gap_of(lm.next_logits(list(prompts)).float(), tokens, aggregator)


def gap_of(logits: Tensor, tokens: ReadoutTokens, aggregator: str = "logsumexp") -> Tensor:
    """Return the gap `[...]` of logits `[..., vocab]`: score(toward) - score(away), in nats.

    The score of a set S of tokens is, by aggregator,

    - `logsumexp`: log sum_{t in S} exp(logit_t). The gap is log p(T) / p(A).
    - `max`: max_{t in S} logit_t, on raw logits; the logit gap of arXiv 2506.24056.
    - `log_odds`: log p(S) / (1 - p(S)). Its gap has the sign of the logsumexp gap, and is twice as
      large where no other token is likely.

    Raises:
        TrimtabError: an unknown aggregator.
    """
    choice("aggregator", aggregator, AGGREGATORS)
    return _score(logits, tokens.toward, aggregator) - _score(logits, tokens.away, aggregator)


def token_text(lm: LanguageModel, token: int) -> str:
    """Return what a single token says."""
    return str(lm.tokenizer.decode([token]))


def _score(logits: Tensor, ids: Sequence[int], aggregator: str) -> Tensor:
    chosen = logits[..., list(ids)]
    if aggregator == "max":
        return chosen.amax(-1)
    if aggregator == "logsumexp":
        return chosen.logsumexp(-1)
    # From the other tokens' own sum: 1 - p would lose every digit where p is close to 1.
    others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others[list(ids)] = False
    return chosen.logsumexp(-1) - logits[..., others].logsumexp(-1)


def _first_tokens(lm: LanguageModel, words: Sequence[str]) -> set[int]:
    found = (spelling.token for word in words for spelling in spellings(lm, word))
    return {token for token in found if token is not None}


def _spelling(lm: LanguageModel, word: str, text: str) -> Spelling:
    ids = tuple(int(i) for i in lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids or ids[0] == lm.tokenizer.unk_token_id:
        return Spelling(word, text, ids, None, "not in the vocabulary")
    # A tokenizer may split the space off: a bare space says nothing.
    if not token_text(lm, ids[0]).strip():
        return Spelling(word, text, ids, None, "opens with a bare space")
    return Spelling(word, text, ids, ids[0])


def _with_apostrophe(text: str, mark: str) -> str:
    for other in APOSTROPHES:
        text = text.replace(other, mark)
    return text
