"""Sort-sum-stop: tokens scored one by one, appended until their summed effects pass the gap."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.prompts.gap.readings import GapReading, Reader
from trimtab.prompts.gap.steps import GapStep, Grown, Slot, grow
from trimtab.prompts.task.constraints import Bound
from trimtab.results import Progress

Scores = tuple[Tensor, Tensor, Tensor]


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
) -> Grown:
    """Close a gap with forward passes only.

    A round: of the tokens that are likely after the slot (mean p over the prompts above
    `least_probability`, mean logit above the vocabulary's mean), each is appended alone and scored

        F(t) = change of gap - shift_weight * KL(next token without || with the slot)
               + mass_weight * change of the wanted side's log-mass,

    all means over the train prompts; first on `screen_rows` of them, then the best
    `kept_candidates` on all. Tokens are sorted by F and appended while their predicted gains
    are summed, until the sum passes what is still open at the `goal` quantile, plus the margin. Then
    the slot is measured after each token; what lies after the point that leaves least open, in the
    mean over prompts, is taken away, and the next round continues from there.

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

    def scores(slot: Slot, now: GapReading, tokens: list[int], count: int) -> Scores:
        """F, gain and shift of each token after the slot, means over the first `count` prompts."""
        found = reader.read([(*slot, token) for token in tokens], count)
        changes = (a - b[:, :count] for a, b in zip(found, now, strict=True))
        gains, shifts, masses = (change.mean(-1) for change in changes)
        gains = reader.objective.sign * gains
        return gains - shift_weight * shifts + mass_weight * masses, gains, shifts

    def extend(
        slot: Slot, now: GapReading, open_: float, room: int
    ) -> tuple[list[GapStep], Slot, GapReading]:
        tokens = _candidates(reader, bound, slot, least_probability, most_candidates)
        if len(tokens) > kept_candidates and screen_rows < len(reader.rows):
            order = _descending(scores(slot, now, tokens, screen_rows)[0])
            tokens = [tokens[i] for i in order[:kept_candidates]]
        if not tokens:
            return [], slot, now
        each, gains, shifts = scores(slot, now, tokens, len(reader.rows))
        steps = [
            GapStep(tokens[i], bound.text([tokens[i]]), float(gains[i]), 0.0, float(shifts[i]))
            for i in _descending(each)
            if float(gains[i]) > 0
        ]
        return _measured(reader, slot, now, _summed(bound, slot, steps, open_, room), margin)

    return grow(reader, "sort", extend, max_tokens, goal, margin, progress)


def _descending(values: Tensor) -> list[int]:
    return values.argsort(descending=True, stable=True).tolist()


def _candidates(
    reader: Reader, bound: Bound, slot: Slot, least_probability: float, most: int
) -> list[int]:
    """Allowed tokens that are likely after the slot, the likeliest first."""
    log_p = reader.next_token(slot)
    likely = log_p.exp().mean(0)
    # Centered log-probabilities are centered logits.
    above = (log_p - log_p.mean(-1, keepdim=True)).mean(0) > 0
    fine = bound.allowed[: len(likely)] & above
    for floor in (least_probability * 10.0**-n for n in range(4)):
        left = (fine & (likely > floor)).nonzero()[:, 0].tolist()
        ranked = sorted(left, key=lambda token: -float(likely[token]))
        longer = [(*slot, token) for token in ranked]
        if kept := bound.first_legal(longer, most, depth=len(longer)):
            return [slot[-1] for slot in kept]
    return []


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
    reader: Reader, slot: Slot, now: GapReading, chosen: list[GapStep], margin: float
) -> tuple[list[GapStep], Slot, GapReading]:
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
    return made, slots[best - 1], found.only(best - 1)
