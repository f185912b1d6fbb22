"""What a steering says through the heads: its value vectors, read in tokens, beside random ones.

The value vectors of reading/head_values.py are read as reading/lens.py says, each head's and their sum, beside the
vector itself and random vectors of equal length at every steered layer, sent through the same heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case, check_adds
from trimtab.mechanism.circuits.teacher_forced import scored_prompts
from trimtab.mechanism.frozen.holding import push_before
from trimtab.mechanism.reading.head_values import head_scales, head_values, reading_layers
from trimtab.mechanism.reading.lens import Lens, LensReading
from trimtab.results.intervals import clopper_pearson
from trimtab.results.tables import ABSENT, Printable, Table, number, with_interval
from trimtab.steering.nulls import null_seeds, random_null

SHOWN = 10  # heads in the table


@dataclass(frozen=True)
class ValueVectors(Printable):
    """A steering read out through its heads.

    Attributes:
        behavior: its name.
        vector: the steering's label.
        model: its name.
        toward: readout tokens of the behavior; empty without readout words.
        away: those of its opposite.
        randoms: how many random vectors the null has.
        own: the vector itself, the sum of its pushes.
        total: sum over all heads, each at its layer's mean scale.
        leading: sum over the heads that carry half of the absolute attribution; None without a
            ranking.
        random: the sum over all heads for one of the random vectors.
        heads: every head above the steering, by absolute attribution, else by length.
        telling: share of heads with p <= 0.05; chance gives 0.05.
        telling_low: to `telling_high` its 95 % interval, as if heads were independent.
        scales: layer to the mean k of reading/head_values.py.
    """

    behavior: str
    vector: str
    model: str
    toward: tuple[str, ...]
    away: tuple[str, ...]
    randoms: int
    own: LensReading
    total: LensReading
    leading: LensReading | None
    random: LensReading
    heads: tuple[LensReading, ...]
    telling: float | None
    telling_low: float | None
    telling_high: float | None
    scales: dict[int, float]

    def table(self) -> Table:
        """Return the sums and the first heads."""
        sums = [self.own, self.total, self.leading, self.random]
        listed = [one for one in sums if one is not None] + list(self.heads[:SHOWN])
        cells = tuple(
            (
                one.name,
                number(one.attribution),
                number(one.length),
                number(one.score),
                ABSENT
                if one.null_low is None
                else f"{number(one.null_low)} to {number(one.null_high)}",
                number(one.p, 3),
                " ".join(map(repr, one.promoted[:6])),
                " ".join(map(repr, one.suppressed[:6])),
            )
            for one in listed
        )
        columns = (
            "what",
            "attribution",
            "length",
            "score",
            "random",
            "p",
            "promoted",
            "suppressed",
        )
        notes = (
            f"score: toward ({', '.join(map(repr, self.toward)) or 'none'}) minus away "
            f"({', '.join(map(repr, self.away)) or 'none'}), in standard deviations of the tokens",
            f"random: 95 % of {self.randoms} vectors of equal length; "
            f"{len(self.heads)} heads in all, of which "
            f"{with_interval(self.telling, self.telling_low, self.telling_high)} have p <= 0.05",
        )
        return Table(f"{self.vector}: what its value vectors say", columns, cells, notes)


@torch.no_grad()
def value_vectors(
    case: Case,
    ranking: Mapping[tuple[int, int], float] | None = None,
    *,
    top: int = 20,
    randoms: int = 200,
    split: str | None = "train",
    max_prompts: int = 8,
) -> ValueVectors:
    """Read a steering's value vectors in tokens.

    Args:
        case: of an additive steering at its strength; a negative one promotes the opposite. Without
            readout words of its behavior there are tokens only, no scores.
        ranking: (layer, head) to attribution; heads are listed by its absolute value.
        top: tokens per reading.
        randoms: vectors of the null.
        split: whose prompts the scales are measured on, None for all.
        max_prompts: at most so many.

    Raises:
        TrimtabError: a steering that does not add, of strength 0, or that no attention reads; a
            model whose heads, norms or head of the vocabulary have no known form.
    """
    lm, vector = case.lm, case.vector
    check_adds(vector)
    vector.check(lm)
    layers = reading_layers(lm, vector)
    if not layers:
        raise TrimtabError(
            asked=f"the value vectors of {vector.label}",
            found="no attention that reads the steered stream",
            advice="steer below the last layer",
        )
    prompts = scored_prompts(case.part(split), 1 if vector.strength > 0 else -1)[:max_prompts]
    scales = head_scales(lm, vector, prompts)
    lens = Lens.of(lm, case.behavior, top)
    nulls = [random_null(vector, null) for null in null_seeds(case.seed, randoms)]

    pushes = [vector, *nulls]  # row 0 is the vector's own, everywhere below
    heads: list[LensReading] = []
    total = torch.zeros(len(pushes), lm.d_model)
    leading, leaders = torch.zeros_like(total), _leaders(ranking or {})
    for layer in layers:
        push = torch.stack([push_before(lm, one, layer, "attention") for one in pushes])
        written = head_values(lm, layer, push) * scales[layer]  # [1 + randoms, heads, d_model]
        total += written.sum(1)
        for head in range(written.shape[1]):
            one = lens.read(f"head {layer}.{head}", written[:, head])
            attribution = None if ranking is None else float(ranking.get((layer, head), 0.0))
            heads.append(replace(one, place=(layer, head), attribution=attribution))
            if (layer, head) in leaders:
                leading += written[:, head]
    order = (lambda h: -h.length) if ranking is None else (lambda h: -abs(h.attribution or 0.0))
    heads.sort(key=order)
    own = torch.stack([push_before(lm, one, lm.n_layers, "attention") for one in pushes])
    telling = None if lens.contrast is None else sum((h.p or 1) <= 0.05 for h in heads)
    low, high = (None, None) if telling is None else clopper_pearson(telling, len(heads))
    words = lens.tokens
    return ValueVectors(
        behavior=case.behavior.name,
        vector=vector.label,
        model=lm.name,
        toward=() if words is None else tuple(words.texts[i] for i in words.toward),
        away=() if words is None else tuple(words.texts[i] for i in words.away),
        randoms=randoms,
        own=lens.read("the vector itself", own),
        total=lens.read("all heads", total),
        leading=lens.read(f"{len(leaders)} leading heads", leading) if leaders else None,
        random=lens.read("a random vector, all heads", total[1:2]),
        heads=tuple(heads),
        telling=None if telling is None else telling / len(heads),
        telling_low=low,
        telling_high=high,
        scales=scales,
    )


def _leaders(ranking: Mapping[tuple[int, int], float]) -> set[tuple[int, int]]:
    """The fewest heads with half of the absolute attribution."""
    order = sorted(ranking, key=lambda one: -abs(ranking[one]))
    before = list(accumulate((abs(ranking[one]) for one in order), initial=0.0))
    return {head for head, so_far in zip(order, before, strict=False) if so_far < before[-1] / 2}
