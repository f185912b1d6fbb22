"""The gap: log-odds of the behaviour's readout words at the first answer position.

gap = logsumexp(logits of the toward tokens) - logsumexp(logits of the away tokens), in nats: the
log-odds that the answer opens with a toward rather than an away token. It needs one forward pass
and no sampling, so layers can be screened with it; it sees only the answer's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimtab.errors import TrimtabError
from trimtab.tables import Printable, Table

if TYPE_CHECKING:
    from trimtab.behavior import Behavior
    from trimtab.chat import Prompt
    from trimtab.model import LanguageModel


@dataclass(frozen=True)
class ReadoutTokens(Printable):
    """The first tokens of the readout words.

    Attributes:
        toward: token ids read as the behaviour.
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

    Errors:
        TrimtabError: when the behaviour has no readout words, or a side shares all its tokens with
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
    texts = {i: _text(lm, i) for i in sorted(toward | away)}
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


def gap(lm: LanguageModel, behavior: Behavior, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Return the readout gap of every prompt, float32 `[n]`, toward minus away, in nats.

    Inside `with vector.on(lm):` it is the steered gap.
    """
    tokens = readout_tokens(lm, behavior)
    logits = lm.next_logits(list(prompts)).float()
    toward = torch.logsumexp(logits[:, list(tokens.toward)], dim=-1)
    return toward - torch.logsumexp(logits[:, list(tokens.away)], dim=-1)


def _first_tokens(lm: LanguageModel, words: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for word in words:
        for text in (word.strip(), " " + word.strip()):
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            # A sentencepiece tokenizer may split the space off: a bare space says nothing.
            if not ids or ids[0] == lm.tokenizer.unk_token_id:
                continue
            if _text(lm, ids[0]).strip():
                found.add(int(ids[0]))
    return found


def _text(lm: LanguageModel, token: int) -> str:
    return str(lm.tokenizer.decode([token]))
