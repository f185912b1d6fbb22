"""Repair: from a slot that violates constraints to one that does not, at the least loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.prompts.discrete.descent import Slot, ranked, replaced, seeded
from trimtab.prompts.scoring.kernel import Kernel
from trimtab.prompts.task.constraints import Bound

Best = Callable[[list[Slot]], list[tuple[float, Slot]]]

_WIDEST = 4096  # candidates a position, whatever the vocabulary
_WEIGHED = 256  # equals whose text is tokenized to tell them apart


def repair(
    kernel: Kernel, best_of: Best, bound: Bound, slot: Slot, top_k: int, seed: int
) -> Iterator[Slot]:
    """Lower the violations of a slot step by step; yields the slot after each step.

    A step replaces one token: by the candidate of fewest violations, of those the one of least
    loss. Where no candidate has fewer, it takes one with as many whose text comes back nearer to
    its tokens; where there is none either, the pool grows to the whole allowed vocabulary, and
    then several tokens are drawn again at once. (violations, tokens astray) falls with every step,
    so it ends. A slot that is legal yields nothing.

    `best_of` gives the best of some candidates as (loss, slot). The first pool holds `top_k`
    candidates a position, half by gradient and half at random; the randomness of a step is a
    function of the seed and the slot.

    Raises:
        TrimtabError: No candidate violates less; names what is left.
    """
    (left,) = bound.violations([slot])
    while left:
        lower = (
            _lower(best_of, bound, slot, left, candidates, max(2, top_k))
            for candidates in _pools(bound, slot, kernel.gradient(slot)[1], top_k, seed)
        )
        following = next((better for better in lower if better is not None), None)
        if following is None:
            kinds = ", ".join(f"{kind} {count}" for kind, count in bound.explain(slot).items())
            raise TrimtabError(
                f"a prompt of {len(slot)} tokens within the constraints",
                f"{bound.text(slot)!r} violates {kinds}, and no replacement violates less",
                "loosen that constraint, or change the number of tokens",
            )
        slot = following
        (left,) = bound.violations([slot])
        yield slot


def _pools(
    bound: Bound, slot: Slot, gradient: Tensor, top_k: int, seed: int
) -> Iterator[list[Slot]]:
    """Single replacements from ever more tokens, then ever more tokens drawn again at once."""
    generator = seeded(seed, slot)
    width = max(2, top_k)
    yield _singles(bound, slot, gradient, width, generator)
    while width < min(len(bound.pool), _WIDEST):
        width *= 4
        yield _singles(bound, slot, gradient, width, generator)
    for changes in range(2, len(slot) + 1):
        yield _draws(bound, slot, changes, 16 * top_k, generator)


def _lower(
    best_of: Best, bound: Bound, slot: Slot, left: int, candidates: list[Slot], scored: int
) -> Slot | None:
    """The candidate of fewest violations, if it improves; candidates come best first.

    Of those that are equal, the first `scored` are weighed by loss.
    """
    cheap = bound.cheap(candidates)
    order = sorted(range(len(candidates)), key=cheap.__getitem__)
    # The round trip adds one at most, so only candidates this low can improve.
    order = [i for i in order if cheap[i] <= left][: 4 * _WEIGHED]
    if not order:
        return None
    totals = bound.violations([candidates[i] for i in order])
    least = min(totals)
    group = [candidates[i] for i, total in zip(order, totals, strict=True) if total == least]
    group = group[:_WEIGHED]
    if least == left:
        strayed = [bound.strayed(candidate) for candidate in group]
        nearest = min(strayed)
        if nearest >= bound.strayed(slot):
            return None
        group = [item for item, far in zip(group, strayed, strict=True) if far == nearest]
    elif least > left:
        return None
    return best_of(group[:scored])[0][1]


def _singles(
    bound: Bound, slot: Slot, gradient: Tensor, width: int, generator: torch.Generator
) -> list[Slot]:
    """One replacement each: half by the gradient, half at random, the best of each place first."""
    tokens = bound.pool
    columns = []
    for position, scores in enumerate(gradient):
        chosen = ranked(bound, scores, min(width, _WIDEST) // 2)
        drawn = tokens[torch.randperm(len(tokens), generator=generator)[:width]].tolist()
        columns.append([replaced(slot, position, token) for token in [*chosen, *drawn]])
    longest = max(map(len, columns))
    mixed = [column[i] for i in range(longest) for column in columns if i < len(column)]
    return [candidate for candidate in dict.fromkeys(mixed) if candidate != slot]


def _draws(
    bound: Bound, slot: Slot, changes: int, count: int, generator: torch.Generator
) -> list[Slot]:
    """Slots with so many random places drawn again from the allowed tokens."""
    tokens = bound.pool
    found = []
    for _ in range(count):
        places = torch.randperm(len(slot), generator=generator)[:changes].tolist()
        new = tokens[torch.randint(len(tokens), (changes,), generator=generator)].tolist()
        drawn = list(slot)
        for place, token in zip(places, new, strict=True):
            drawn[place] = token
        found.append(tuple(drawn))
    return [candidate for candidate in dict.fromkeys(found) if candidate != slot]
