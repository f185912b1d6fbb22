"""Sort-sum-stop: tokens scored one by one, appended until their summed effects pass the gap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.prompts.gap.steps import Found, GapStep, concluded
from trimtab.results import Progress

if TYPE_CHECKING:
    from trimtab.prompts.gap.readings import Reader, Reading
    from trimtab.prompts.task.constraints import Bound

Slot = tuple[int, ...]


def sort_sum_stop(
    reader: Reader,
    bound: Bound,
    *,
    max_tokens: int = 12,
    goal: float = 0.9,
    margin: float = 0.0,
    least_probability: float = 1e-4,
    most_candidates: int = 256,
    screen_rows: int = 2,
    kept_candidates: int = 12,
    shift_weight: float = 0.1,
    mass_weight: float = 0.1,
    progress: Progress | None = None,
) -> Found:
    """Close a gap with forward passes only.

    A round: of the tokens that are likely behind the slot (mean p over the prompts above
    `least_probability`, mean logit above the vocabulary's mean), each is appended alone and scored

        F(t) = change of gap - shift_weight * KL(next token without || with the slot)
               + mass_weight * change of the wanted side's log-mass,

    all means over the train prompts; first on `screen_rows` of them, then the best
    `kept_candidates` on all. Tokens are sorted by F and appended while their predicted gains
    are summed, until the sum passes what is still open at the `goal` quantile, plus the margin. Then
    the slot is measured after each token; what lies behind the point that leaves least open, in the
    mean over prompts, is taken away, and the next round goes on from there.

    Source: the forward-only search of arXiv 2506.24056, whose exact proxies are not published; the
    in-distribution filter is that of its second version.

    Args:
        reader: Reads slots on the train prompts.
        bound: What a slot may hold.
        max_tokens: Most tokens of the slot.
        goal: Share of train prompts to close.
        margin: Gap wanted beyond zero.
        least_probability: Of a candidate token; lowered by tens where nothing is left.
        most_candidates: The likeliest ones of a round.
        screen_rows: Prompts that every candidate is scored on.
        kept_candidates: The best of those are scored on all prompts.
        shift_weight: lambda, per nat of shift.
        mass_weight: mu, per nat of log-mass.
        progress: Called with tokens in the slot and `max_tokens`.

    Raises:
        TrimtabError: A goal that is no share, or no tokens allowed.
    """
    if not 0 < goal <= 1 or max_tokens < 1:
        raise TrimtabError(
            f"a gap search with goal {goal} and {max_tokens} tokens",
            "no share from 0 to 1, or no tokens",
            "use a goal such as 0.9 and one token or more",
        )
    sign = reader.objective.sign
    fed = reader.sequences - len(reader.rows)  # the prompts as they are count too
    slot: Slot = ()
    now = reader.bare
    steps: list[GapStep] = []
    stopped = ""
    while not stopped:
        open_ = need(sign * now.gaps[0], goal) + margin
        if open_ <= 0 and slot:
            stopped = "closed"
        elif len(slot) == max_tokens:
            stopped = f"{max_tokens} tokens used"
        else:
            order = _scored(
                reader, bound, slot, now, least_probability, most_candidates,
                screen_rows, kept_candidates, (shift_weight, mass_weight),
            )  # fmt: skip
            chosen = _summed(bound, slot, order, open_, max_tokens - len(slot))
            made, slot, now = _measured(reader, slot, now, chosen, margin)
            steps += made
            if not any(step.kept for step in made):
                stopped = "no token that helps when measured"
        if progress is not None:
            progress(len(slot), max_tokens)
    return concluded(reader, "sort", slot, steps, now, stopped, fed)


def need(gaps: Tensor, goal: float) -> float:
    """What has to be gained so that a share `goal` of the prompts is closed."""
    ordered = gaps.sort(descending=True).values
    return -float(ordered[min(len(ordered), math.ceil(goal * len(ordered))) - 1])


def _candidates(
    reader: Reader, bound: Bound, slot: Slot, least_probability: float, most: int
) -> list[int]:
    """Allowed tokens that are likely behind the slot, the likeliest first."""
    log_p = reader.next_token(slot)
    likely = log_p.exp().mean(0)
    # Centerd log-probabilities are centered logits.
    above = (log_p - log_p.mean(-1, keepdim=True)).mean(0) > 0
    fine = bound.allowed[: len(likely)] & above
    for floor in (least_probability * 10.0**-n for n in range(4)):
        left = (fine & (likely > floor)).nonzero()[:, 0].tolist()
        ranked = sorted(left, key=lambda token: -float(likely[token]))
        legal = bound.legal([(*slot, token) for token in ranked])
        kept = [token for token, good in zip(ranked, legal, strict=True) if good]
        if kept:
            return kept[:most]
    return []


def _scored(
    reader: Reader,
    bound: Bound,
    slot: Slot,
    now: Reading,
    least_probability: float,
    most: int,
    screen_rows: int,
    kept: int,
    weights: tuple[float, float],
) -> list[GapStep]:
    """Candidates alone behind the slot, the best F first; tokens without gain are left out."""
    tokens = _candidates(reader, bound, slot, least_probability, most)
    if len(tokens) > kept and screen_rows < len(reader.rows):
        scores = _scores(reader, slot, tokens, now, weights, screen_rows)[0]
        tokens = [tokens[i] for i in scores.argsort(descending=True, stable=True)[:kept].tolist()]
    if not tokens:
        return []
    scores, gains, shifts = _scores(reader, slot, tokens, now, weights, len(reader.rows))
    order = scores.argsort(descending=True, stable=True).tolist()
    return [
        GapStep(tokens[i], bound.text([tokens[i]]), float(gains[i]), 0.0, float(shifts[i]))
        for i in order
        if float(gains[i]) > 0
    ]


def _scores(
    reader: Reader,
    slot: Slot,
    tokens: list[int],
    now: Reading,
    weights: tuple[float, float],
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """F, gain and shift of each token behind the slot, means over the first `count` prompts."""
    found = reader.read([(*slot, token) for token in tokens], count)
    gains = reader.objective.sign * (found.gaps - now.gaps[:, :count]).mean(-1)
    shifts = (found.shifts - now.shifts[:, :count]).mean(-1)
    masses = (found.masses - now.masses[:, :count]).mean(-1)
    return gains - weights[0] * shifts + weights[1] * masses, gains, shifts


def _summed(
    bound: Bound, slot: Slot, order: list[GapStep], open_: float, room: int
) -> list[GapStep]:
    """Tokens in order until their predicted gains pass what is open; each stays legal in place."""
    chosen: list[GapStep] = []
    total = 0.0
    for step in order:
        if len(chosen) == room or (chosen and total >= open_):
            break
        longer = (*slot, *(s.token for s in chosen), step.token)
        if bound.legal([longer])[0]:
            chosen.append(step)
            total += step.predicted
    return chosen


def _measured(
    reader: Reader, slot: Slot, now: Reading, chosen: list[GapStep], margin: float
) -> tuple[list[GapStep], Slot, Reading]:
    """The chosen tokens with their true gains, cut back to the point that leaves least open."""
    if not chosen:
        return [], slot, now
    sign = reader.objective.sign
    slots = [(*slot, *(s.token for s in chosen[: n + 1])) for n in range(len(chosen))]
    found = reader.read(slots)
    gaps = torch.cat([now.gaps, found.gaps])
    # Of a mean over prompts that are closed and prompts that are not, only the latter counts.
    open_ = (margin - sign * gaps).clamp(min=0).mean(-1).tolist()
    best = min(range(len(open_)), key=lambda n: (open_[n], n))
    means = (sign * gaps).mean(-1).tolist()
    made = [
        GapStep(
            s.token, s.text, s.predicted, means[n + 1] - means[n], s.shift, kept=n < best
        )
        for n, s in enumerate(chosen)
    ]  # fmt: skip
    if best == 0:
        return made, slot, now
    kept = type(found)(
        *(getattr(found, name)[best - 1 : best] for name in ("gaps", "shifts", "masses"))
    )
    return made, slots[best - 1], kept
