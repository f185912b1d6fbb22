"""Readout sets learned from the model's own first answer tokens, on train, checked on validation.

Each token t opens c_T(t) of n_T toward answers and c_A(t) of n_A away answers (greedy). Its
log-odds ratio with one half added to each cell (Haldane 1940, Anscombe 1956),

    delta(t) = log (c_T + 1/2) / (n_T - c_T + 1/2) - log (c_A + 1/2) / (n_A - c_A + 1/2),

over its standard error sqrt(sum of 1 / (cell + 1/2)) is the z by which tokens are ranked: one that
was seen once tells less than one that was seen thirty times at the same ratio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import ReadoutTokens, token_text
from trimtab.margins.census import Census, count_first_tokens
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Printable, Table, number

SIDES = ("toward", "away")
MOST = 8  # tokens a set may have
LEAST = 2  # answers that a token must open
LEAST_RATIO = 3.0  # smoothed odds ratio that a token must reach
LEAST_Z = 1.0  # below it a token is left out
ROWS = 64  # prompts whose logits are held at a time


@dataclass(frozen=True)
class LearnedToken:
    """One token of a learned set.

    Attributes:
        side: the set it is in.
        token: its id; text: what it says.
        toward: toward answers of the train split that open with it; away: away answers.
        log_odds: smoothed log-odds ratio, positive for toward.
        z: log_odds over its standard error.
    """

    side: str
    token: int
    text: str
    toward: int
    away: int
    log_odds: float
    z: float


@dataclass(frozen=True)
class LearnedSets(Printable):
    """Two sets of tokens and how they do on prompts they were not learned from.

    Attributes:
        tokens: the sets.
        rows: each token with its counts.
        held_out: census of the validation split.
    """

    tokens: ReadoutTokens
    rows: tuple[LearnedToken, ...]
    held_out: Census

    def table(self) -> Table:
        rows = tuple(
            (r.side, str(r.token), repr(r.text), str(r.toward), str(r.away))
            + (number(r.log_odds), number(r.z))
            for r in self.rows
        )
        right = [
            f"{getattr(one, side).cell} of {one.n} held-out {side} answers open in their own set"
            for side, one in self.held_out.sides.items()
        ]
        columns = ("side", "id", "text", "toward answers", "away answers", "log-odds", "z")
        return Table("Learned readout tokens", columns, rows, tuple(right))


def learn_sets(lm: LanguageModel, behavior: Behavior, *, seed: int = 0) -> LearnedSets:
    """Learn both sets from greedy first tokens of the train split.

    Args:
        lm: the model.
        behavior: its prompts; readout words are not looked at.
        seed: of the split.

    Raises:
        TrimtabError: when answers of both sides open alike, so that a set stays empty.
    """
    splits = behavior.split(seed)
    found = {s: _greedy(lm, splits.train, s) for s in SIDES}
    rows = _rank(lm, {s: Counter(ids.tolist()) for s, ids in found.items()})
    chosen = [row for s in SIDES for row in [r for r in rows if r.side == s][:MOST]]
    for side in SIDES:
        if not any(row.side == side for row in chosen):
            common = Counter(found[side].tolist()).most_common(3)
            most = ", ".join(f"{token_text(lm, token)!r} {count}" for token, count in common)
            raise TrimtabError(
                asked=f"readout sets of {behavior.name!r} learned from first answer tokens",
                found=f"no token that tells {side} answers apart (most frequent: {most})",
                advice="give readout words, or prompts whose answers open differently",
            )
    sets = {s: tuple(sorted(r.token for r in chosen if r.side == s)) for s in SIDES}
    tokens = ReadoutTokens(sets["toward"], sets["away"], (), {r.token: r.text for r in chosen})
    held_out = {s: _greedy(lm, splits.validation, s) for s in SIDES}
    return LearnedSets(tokens, tuple(chosen), count_first_tokens(lm, held_out, tokens))


def log_odds(counts: Mapping[str, int], totals: Mapping[str, int]) -> tuple[float, float]:
    """Return the smoothed log-odds ratio of a token and its z; see the module's docstring."""
    value, variance = 0.0, 0.0
    for side, sign in (("toward", 1), ("away", -1)):
        hit, miss = counts[side] + 0.5, totals[side] - counts[side] + 0.5
        value += sign * math.log(hit / miss)
        variance += 1 / hit + 1 / miss
    return value, value / math.sqrt(variance)


def _rank(lm: LanguageModel, counts: Mapping[str, Counter[int]]) -> list[LearnedToken]:
    totals = {side: counts[side].total() for side in SIDES}
    rows = []
    for token in sorted({*counts["toward"], *counts["away"]}):
        seen = {side: counts[side][token] for side in SIDES}
        value, z = log_odds(seen, totals)
        if max(seen.values()) < LEAST or abs(value) < math.log(LEAST_RATIO) or abs(z) < LEAST_Z:
            continue
        side = "toward" if z > 0 else "away"
        text = token_text(lm, token)
        rows.append(LearnedToken(side, token, text, seen["toward"], seen["away"], value, z))
    return sorted(rows, key=lambda row: -abs(row.z))


def _greedy(lm: LanguageModel, behavior: Behavior, side: str) -> Tensor:
    prompts = [example.prompt for example in getattr(behavior, side)]
    parts = [prompts[start : start + ROWS] for start in range(0, len(prompts), ROWS)]
    return torch.cat([lm.next_logits(part).argmax(-1) for part in parts])
