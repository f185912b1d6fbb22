"""The geometry of a behavior in one report: is it linear, is it identity, is it low rank?

The claim examined: appending tokens, adding a vector and editing weights at low rank are one
operation, because the stream carries a perturbation almost unchanged and the behavior is low rank.
Every part of it is measured, beside its null, and said in one sentence each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from trimtab.checks import layer_within
from trimtab.errors import TrimtabError
from trimtab.margins.radius import Gradients, gap_gradients
from trimtab.mechanism.case import Case, counting
from trimtab.mechanism.geometry.feasibility import Feasibility, FeasibilityRow, feasibility
from trimtab.mechanism.geometry.functional_rank import FunctionalRank, functional_rank
from trimtab.mechanism.geometry.jacobian import depth_name
from trimtab.mechanism.geometry.linearity import Linearity, linearity
from trimtab.mechanism.geometry.positions import PositionShares, position_shares
from trimtab.mechanism.geometry.propagator import Propagator, propagator
from trimtab.mechanism.geometry.rank import Ranks, pair_differences, rank_row
from trimtab.models.chat import Prompt
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number, percent

STAGES = 6
PLAIN = "Please."  # put into the prompts of a behavior without a prompt of its own
FUNCTIONAL_KS = (1, 2, 3, 4, 8, 16, 64)
IDENTITY = 0.1  # departures up to this are called identity


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        model: its name.
        dtype: of its weights.
        behavior: its name; `data_hash` of its content.
        vector: its label.
        layer: 0-based; functional rank and feasibility change the last position after this block.
        layer_from: how it was chosen.
        seed: of the split and of everything random.
        seconds: that the report took.
    """

    model: str
    dtype: str
    behavior: str
    data_hash: str
    vector: str
    layer: int
    layer_from: str
    seed: int
    seconds: float


@dataclass(frozen=True)
class GeometryReport(Printable):
    """A geometry.

    Attributes:
        measured: model, behavior, vector.
        propagator: how pushes arrive at the final stream.
        positions: which positions the gap listens to, and on which way.
        linearity: how far first order holds.
        ranks: of differences and gradients.
        functional: dimensions it takes to move the gap.
        feasibility: one push for all prompts.
        findings: one sentence each.
    """

    measured: Measured
    propagator: Propagator
    positions: PositionShares
    linearity: Linearity
    ranks: Ranks
    functional: FunctionalRank
    feasibility: Feasibility
    findings: tuple[str, ...]

    def table(self) -> Table:
        """Return the findings."""
        one = self.measured
        rows = tuple((str(k + 1), text) for k, text in enumerate(self.findings))
        note = (
            f"{one.vector}; layer {one.layer} ({one.layer_from}); {one.dtype}, seed {one.seed}, "
            f"{number(one.seconds, 1)} s"
        )
        return Table(f"Geometry of {one.behavior} in {one.model}", ("", "finding"), rows, (note,))

    def tables(self) -> tuple[Table, ...]:
        """Return the findings and every part's tables."""
        return (
            self.table(),
            *self.propagator.tables(),
            self.positions.table(),
            self.positions.crossing_table(),
            self.linearity.table(),
            self.ranks.table(),
            self.functional.table(),
            *self.feasibility.tables(),
        )


def geometry(
    case: Case,
    *,
    layer: int | None = None,
    prompts: int = 4,
    pairs: tuple[int, int] = (48, 16),
    probes: int = 4,
    progress: Progress | None = None,
) -> GeometryReport:
    """Measure the geometry of a behavior: propagator, positions, linearity, ranks, feasibility.

    Directions, subspaces and pushes come from the train split, figures from the test split.

    Args:
        case: its vector at the strength at which it is used; float32 gives gaps their full precision.
        layer: 0-based, for functional rank and feasibility; when absent the first of the vector's
            layers where the away states, moved by the train pairs' differences, change the gap to
            first order by at least half of what they change it by at any of them.
        prompts: test prompts of each side for propagator, positions and linearity.
        pairs: train and test pairs for ranks and feasibility.
        probes: random directions per prompt and depth.
        progress: called with (stages done, stages in all).
    """
    started = perf_counter()
    lm, vector = case.lm, case.vector
    vector.check(lm)
    if prompts < 1 or min(pairs) < 3 or probes < 1:
        raise TrimtabError(
            asked="a geometry",
            found=f"prompts={prompts}, pairs={pairs}, probes={probes}",
            advice="use at least one prompt, three pairs and one random direction",
        )
    done = counting(progress, STAGES)
    train, test = case.splits.train, case.splits.test
    sides: list[Prompt] = [
        example.prompt for side in (test.toward, test.away) for example in side[:prompts]
    ]
    gradients = {
        side: gap_gradients(lm, case.readout, [lm.encode(e.prompt) for e in some[: pairs[0]]])
        for side, some in (("toward", train.toward), ("away", train.away))
    }
    at, layer_from = _layer(case, layer, pairs[0], gradients["away"])
    layers = sorted({0, at, max(lm.n_layers - 2, 0)})
    carried = done(propagator(case, [lm.encode(prompt) for prompt in sides], probes))
    text = case.behavior.prompt_toward or PLAIN
    positions = done(position_shares(case, sides, {"prefix": text, "suffix": f" {text}"}))
    linear = done(linearity(case, sides, layers))
    ranks = done(_ranks(case, layers, pairs[0], gradients))
    ks = [*(k for k in FUNCTIONAL_KS if k < lm.d_model), lm.d_model]
    functional = done(functional_rank(case, at, pairs, ks, gradients))
    feasible = done(feasibility(case, at, pairs, gradients))
    about = Measured(
        model=lm.name,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        behavior=case.behavior.name,
        data_hash=case.behavior.data_hash,
        vector=vector.label,
        layer=at,
        layer_from=layer_from,
        seed=case.seed,
        seconds=perf_counter() - started,
    )
    said = _findings(at, carried, positions, linear, ranks, functional, feasible)
    return GeometryReport(about, carried, positions, linear, ranks, functional, feasible, said)


def _layer(case: Case, asked: int | None, pairs: int, away: Gradients) -> tuple[int, str]:
    if asked is not None:
        return layer_within(asked, case.lm.n_layers), "as asked for"
    layers = case.vector.layers
    if len(layers) == 1:
        return layers[0], "the vector's"
    moves = pair_differences(case.lm, case.splits.train, layers, pairs)
    grad = away.grad[: len(moves[layers[0]])].double()
    effect = {k: float((grad[:, k] * moves[k]).sum(-1).mean()) for k in layers}
    found = next(k for k in layers if effect[k] >= max(effect.values()) / 2)
    return found, "the vector's first with half of the first-order effect, train pairs"


def _ranks(
    case: Case, layers: Sequence[int], pairs: int, gradients: Mapping[str, Gradients]
) -> Ranks:
    train = case.splits.train
    moves = pair_differences(case.lm, train, layers, pairs)
    what = "differences" if train.paired else "differences, unpaired"
    rows = [rank_row(moves[k], what, depth_name(k + 1), case.seed) for k in layers]
    rows += [
        rank_row(one.grad[:, k], f"gradients, {side}", depth_name(k + 1), case.seed)
        for side, one in gradients.items()
        for k in layers
    ]
    return Ranks(tuple(rows))


def _findings(
    layer: int,
    carried: Propagator,
    positions: PositionShares,
    linear: Linearity,
    ranks: Ranks,
    functional: FunctionalRank,
    feasible: Feasibility,
) -> tuple[str, ...]:
    """One sentence per part."""
    site = depth_name(layer + 1)
    found = [_identity(site, carried), carried.note + _prompt_share(positions)]
    gradient = next(r for r in linear.rows if (r.site, r.direction) == (site, "gradient"))
    found.append(
        f"First order holds up to {number(gradient.radius.median)} |h| along the gradient at {site}; "
        f"a replaced token moves that position by {number(gradient.token_edit.median)} |h|. Seen from "
        f"the embedding, {percent(linear.edits.beyond.mean)} of token edits leave the linear region, "
        f"and the change predicted has the right sign in {percent(linear.edits.same_sign.mean)}."
    )
    rows = [row for row in ranks.rows if row.site == site]
    said = "; ".join(
        f"{row.what} {number(row.stable.value)} (random {number(row.stable.null)})" for row in rows
    )
    found.append(f"Stable rank at {site}: {said}.")
    found.append(_functional(site, functional, carried.d_model))
    found += [_one_push(site, row) for row in feasible.rows]
    return tuple(found)


def _identity(site: str, carried: Propagator) -> str:
    one = next((x for x in carried.layers if x.site == site), None)
    if one is None:
        return f"{site} is the final stream: J = I there by definition."
    frobenius, own = one.same_frobenius, one.vector.get("same")
    holds = frobenius.value <= IDENTITY and (own is None or own.departure.mean <= IDENTITY)
    vector = ""
    if own is not None:
        random = one.random["same"]
        vector = (
            f"the vector arrives with gain {number(own.gain.mean)}, cosine {number(own.cosine.mean)} "
            f"and |Jv - v| / |v| = {number(own.departure.mean)} (random: {number(random.gain.mean)}, "
            f"{number(random.cosine.mean)}, {number(random.departure.mean)}); "
        )
    return (
        f"J = I {'holds' if holds else 'does not hold'} from {site} to the final stream: {vector}"
        f"|J - I| / |I| = {frobenius.cell}, cos(g, g_L) = {number(one.backward_cosine.mean)}."
    )


def _prompt_share(positions: PositionShares) -> str:
    said = [
        f"{percent(row.share.mean)} on the {row.slot}"
        for row in positions.rows
        if row.slot == row.group and row.slot != "none"
    ]
    other = positions.crossing["none"][0]
    text = f" At the embedding {percent(other.mean)} of the gap's squared gradient is at other positions"
    return text + (f"; with an insert, {' and '.join(said)}." if said else ".")


def _functional(site: str, functional: FunctionalRank, width: int) -> str:
    added, null = functional.row("added", "differences"), functional.row("added", "random")
    ablated = functional.row("ablated", "differences")
    if math.isnan(added.k) and math.isnan(ablated.k):
        return (
            f"No functional rank at {site}: the other side's whole state at the last position changes "
            f"the gap by {added.full.cell} nats, which is not told from 0 in the direction expected."
        )
    said = [
        {"nan": "not told", "inf": "above all tried"}.get(f"{row.k:.0f}", f"{row.k:.0f}")
        for row in (added, ablated, null)
    ]
    return (
        f"Functional rank at {site} on held-out prompts: {said[0]} added, {said[1]} ablated (random "
        f"subspaces: {said[2]} of {width})."
    )


def _one_push(site: str, row: FeasibilityRow) -> str:
    if not row.feasible:
        return f"No push at {site} crosses zero on all {row.n} {row.side} prompts, to first order."
    if not row.norm:
        return (
            f"All {row.n} {row.side} train prompts are on the other side of zero already: no push."
        )
    told = (
        f"One push of {number(row.norm, 3)} |h| at {site} crosses zero on all {row.n} {row.side} "
        f"prompts to first order (hardest alone {number(row.alone, 3)}, random {number(row.null, 3)})"
    )
    mine = [one for one in row.pushed if one.direction == "program"]
    if not mine:
        return told + "."
    last = mine[-1]
    return told + (
        f"; really pushed at {number(last.factor)} times that, {percent(last.train.share)} of train "
        f"and {percent(last.test.share)} of held-out prompts cross."
    )
