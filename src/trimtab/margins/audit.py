"""The audit: how wide is a behavior's margin, measured on held-out prompts, with nothing searched.

Gap, census, resolution, first-order radius and the KL it takes to close the gap; for two
checkpoints the paired differences as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from trimtab.arguments import MAX_PROMPTS
from trimtab.behaviors.behavior import Behavior
from trimtab.checks import choice, layer_within
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import AGGREGATORS, ReadoutTokens, token_text
from trimtab.margins.baked import held_out, null_changes
from trimtab.margins.census import count_first_tokens
from trimtab.margins.close import (
    SIGNS,
    CloseRow,
    KlToClose,
    close_side,
    pusher,
    steepest_layer,
)
from trimtab.margins.compared import AuditParts, Compared, compare
from trimtab.margins.gap import read, report_gaps
from trimtab.margins.learned import LearnedSets
from trimtab.margins.radius import gap_gradients, report_radius
from trimtab.margins.sets import Resolution, of_tokens, resolve
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.results import Progress, stepper
from trimtab.results.tables import Printable, Table, number, with_interval
from trimtab.steering.layers import default_layers
from trimtab.steering.vector import VectorSteering

LISTS = ("toward", "away", "requests", "neutral")
STAGES = 5  # per checkpoint, for the progress


@dataclass(frozen=True)
class Audited:
    """What was audited.

    Attributes:
        model: its name.
        dtype: of its weights; half precision rounds gaps to a few hundredths.
        behavior: its name; `data_hash` of its content.
        split: whose prompts are read; the shared vector and the layer come from `train`.
        seed: of the split, the nulls and the intervals.
        prompts: list of prompts to its size.
        seconds: that the audit took.
    """

    model: str
    dtype: str
    behavior: str
    data_hash: str
    split: str
    seed: int
    prompts: dict[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AuditReport(AuditParts, Printable):
    """An audit: its parts, and what they are of.

    Attributes:
        audited: model, behavior, prompts.
        compared: the second checkpoint and the paired differences; None without one.
    """

    audited: Audited
    compared: Compared | None

    def tables(self) -> tuple[Table, ...]:
        """Return every part's table, in the order they are read."""
        parts: list[Printable] = [self.census, self.resolution, self.radius, self.kl_to_close]
        first = [] if self.compared is None else [self.compared.table()]
        first += [self.gap.table(), self.gap.units_table()]
        return (*first, *(part.table() for part in parts))

    def table(self) -> Table:
        rows = []
        last = {side: layers[-1] for side, layers in self.radius.sides.items()}
        for side in SIGNS:
            one, shares = self.gap.sides[side], self.census.sides[side]
            own, shared = (self._row(side, lever) for lever in ("gradient", "shared"))
            rows.append(
                (
                    side,
                    str(one.n),
                    one.gap.cell,
                    with_interval(one.positive, one.positive_low, one.positive_high),
                    number(shares.toward.share),
                    number(shares.away.share),
                    number(shares.neither.share),
                    number(last[side].relative.median),
                    *(number(row.kl.median, 3) for row in (own, shared)),
                    number(own.null_closed),
                )
            )
        columns = ("prompts", "n", "median gap", "share > 0", "census toward", "away", "neither")
        columns += ("radius / |h|, last layer", "KL to close", "by one vector", "random closes")
        title = f"audit of {self.audited.behavior} on {self.audited.model}"
        return Table(title, columns, tuple(rows), (self.gap.sign,))

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON-able values; `compared` is there only with a second checkpoint."""
        plain = super().to_dict()
        if self.compared is None:
            del plain["compared"]
        return plain

    def _row(self, side: str, lever: str) -> CloseRow:
        return next(r for r in self.kl_to_close.rows if (r.side, r.lever) == (side, lever))


def audit(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    against: LanguageModel | None = None,
    baked: Sequence[VectorSteering] = (),
    aggregator: str = "logsumexp",
    sets: LearnedSets | ReadoutTokens | None = None,
    layer: int | None = None,
    max_prompts: int | None = MAX_PROMPTS,
    seed: int = 0,
    progress: Progress | None = None,
) -> AuditReport:
    """Measure a behavior's margin on the test split; search for nothing, change nothing.

    Args:
        lm: the model; float32 gives gaps their full precision.
        behavior: its test split is read, its train split gives the shared vector and the layer.
        against: a second checkpoint; differences are `lm` minus `against`, paired by prompt.
        baked: what `lm` has in its weights and `against` has not: random directions as long stand
            beside the differences as a null. From a checkpoint's record: `margins.baked.recorded`.
        aggregator: `logsumexp`, `max` or `log_odds`: for quantiles, radius and closing; the gap is
            given by all three.
        sets: sets to read in place of the behavior's words, e.g. from `learn_sets`.
        layer: 0-based, whose output is pushed to close the gap; by default the one of the middle
            layers with the smallest first-order radius on train prompts.
        max_prompts: at most so many of each list of prompts; None for all.
        seed: of the split, the nulls and the intervals.
        progress: called with (stages done, stages in all).

    Raises:
        TrimtabError: no readout words and no sets, a behavior too small to split, an unknown
            aggregator, sets for another tokenizer, or values that are not finite.
    """
    started = perf_counter()
    choice("aggregator", aggregator, AGGREGATORS)
    if baked and against is None:
        raise TrimtabError(
            asked="an audit with the random control of what was baked in",
            found="no second checkpoint",
            advice="give the model that it was baked into as against",
        )
    if max_prompts is not None and max_prompts < 1:
        raise TrimtabError(
            asked="an audit", found=f"max_prompts={max_prompts}", advice="read at least one prompt"
        )
    # Read first: what cannot be resolved under the second tokenizer should cost no forward pass.
    models = [lm] if against is None else [lm, against]
    resolved = [_resolution(model, behavior, sets, lm) for model in models]
    step = stepper(progress, STAGES * len(models))
    plan = _Plan(behavior, aggregator, max_prompts, seed, step)
    found: list[AuditParts] = []
    for model, resolution in zip(models, resolved, strict=True):
        at, layer_from = layer, "as asked for"
        if layer is None and found and model.n_layers == lm.n_layers:
            at, layer_from = found[0].kl_to_close.layer, "as in the audited model"
        found.append(_measure(model, resolution, plan, at, layer_from))
    mine = found[0]
    compared = None
    if against is not None:
        name = against.name if against.name != lm.name else f"{against.name} (other)"
        nulls, new = {}, None
        if baked:
            nulls = null_changes(against, found[1], plan.encoded(against, "test"), baked, seed)
            new = held_out(baked, behavior, seed)
        compared = compare(lm.name, mine, name, found[1], seed, nulls, new)
    about = Audited(
        lm.name,
        str(lm.model.dtype).removeprefix("torch."),
        behavior.name,
        behavior.data_hash,
        "test",
        seed,
        {side: one.n for side, one in mine.gap.sides.items()},
        perf_counter() - started,
    )
    return AuditReport(**vars(mine), audited=about, compared=compared)


def _resolution(
    lm: LanguageModel,
    behavior: Behavior,
    sets: LearnedSets | ReadoutTokens | None,
    learned_on: LanguageModel,
) -> Resolution:
    if sets is None:
        return resolve(lm, behavior)
    tokens = sets.tokens if isinstance(sets, LearnedSets) else sets
    ids = (*tokens.toward, *tokens.away)
    if lm is not learned_on and [token_text(lm, i) for i in ids] != [tokens.texts[i] for i in ids]:
        raise TrimtabError(
            asked=f"an audit of {lm.name} with sets given as tokens of {learned_on.name}",
            found="tokenizers that do not agree on them",
            advice="audit each model with sets of its own, or give readout words",
        )
    return of_tokens(tokens)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is the same for both checkpoints."""

    behavior: Behavior
    aggregator: str
    max_prompts: int | None
    seed: int
    step: Callable[[], None]

    def encoded(self, lm: LanguageModel, split: str) -> dict[str, list[Encoded]]:
        """Return the prompts of each list of a split that has some."""
        part = self.behavior.split(self.seed).named(split)
        chosen = {name: getattr(part, name)[: self.max_prompts] for name in LISTS}
        return {name: [lm.encode(e.prompt) for e in some] for name, some in chosen.items() if some}


def _measure(
    lm: LanguageModel, resolution: Resolution, plan: _Plan, layer: int | None, layer_from: str
) -> AuditParts:
    """Measure one checkpoint."""
    tokens, aggregator, seed = resolution.tokens, plan.aggregator, plan.seed
    encoded = plan.encoded(lm, "test")
    readings = {side: read(lm, tokens, prompts) for side, prompts in encoded.items()}
    gap = report_gaps(lm, readings, tokens, plan.behavior.name, aggregator, seed)
    census = count_first_tokens(lm, {s: r.greedy for s, r in readings.items()}, tokens)
    plan.step()
    tested = {s: gap_gradients(lm, tokens, encoded[s], aggregator) for s in SIGNS}
    radius = report_radius(tested, aggregator, seed)
    plan.step()
    train = plan.encoded(lm, "train")
    learned = {s: gap_gradients(lm, tokens, train[s], aggregator) for s in SIGNS}
    plan.step()
    if layer is None:
        at = steepest_layer(learned, default_layers(lm.n_layers))
        layer_from = "of the middle layers the one with the smallest radius on train prompts"
    else:
        at = layer_within(layer, lm.n_layers)
    rows = []
    for side in SIGNS:
        pushes = pusher(lm, tokens, encoded[side], at, aggregator)
        rows += close_side(pushes, side, tested[side], learned[side].grad[:, at].mean(0), seed)
        plan.step()
    return AuditParts(
        gap, census, resolution, radius, KlToClose(at, layer_from, aggregator, tuple(rows))
    )
