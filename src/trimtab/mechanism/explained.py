"""Why a steering works, in one report: where it acts, through what, what it says, how sparse, how linear.

Edges and their circuit, parts of the network frozen, value vectors read in tokens, dimensions taken
away, and the geometry of the gap; beside each a random vector of equal length. Edges and dimensions
are chosen on validation and train prompts, scores are those of test prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from trimtab.arguments import MAX_NEW_TOKENS, MAX_PROMPTS, NULLS, Direction, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case, check_adds, counting
from trimtab.mechanism.circuits.attribution import Attribution, AttributionSummary, attribute
from trimtab.mechanism.circuits.faithful import Circuit, Faithfulness, Samples, minimal_circuit
from trimtab.mechanism.circuits.interchange import Interchange, check_places, interchange
from trimtab.mechanism.conclusions import Finding, conclusions
from trimtab.mechanism.frozen.freeze import FreezeTable, freeze_table
from trimtab.mechanism.geometry.geometry import GeometryReport, geometry
from trimtab.mechanism.reading.value_vector import ValueVectors, value_vectors
from trimtab.mechanism.sparse.curve import SparsityCurve, sparsity_curve
from trimtab.mechanism.working import Working, working_strength
from trimtab.models.model import LanguageModel
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.vector import VectorSteering

STAGES = 7  # one more against another vector
SHARES = (0.3, 0.1, 0.03)
ORDERS = ("attribution", "magnitude", "random")
TENTH = 0.1  # of the edges: those whose overlap with a random vector's is told


@dataclass(frozen=True)
class Explained:
    """What was explained.

    Attributes:
        model: its name.
        behavior: its name; `data_hash` of its content.
        vector: the steering's label, at the strength that is explained.
        site: where it is added, and at which `layers`, over which tokens (`scope`).
        signs: directions read: 1 toward, -1 away.
        samples: (prompt, response) pairs that edges were chosen on.
        seed: of the split, nulls and intervals.
        seconds: that it took.
    """

    model: str
    behavior: str
    data_hash: str
    vector: str
    site: str
    layers: tuple[int, ...]
    scope: str
    signs: tuple[int, ...]
    samples: int
    seed: int
    seconds: float


@dataclass(frozen=True)
class RandomEdges:
    """The edges of a random vector of equal length.

    Attributes:
        effect: what it moves the metric by on its own responses, in logits; 0 where it changes none.
        overlap: share of the highest tenth of edges that both vectors have in common.
        chance: what two random tenths have in common.
        carried: faithfulness under the explained vector of the random one's highest edges, as many as
            the circuit has; None where the random vector changes no token.
    """

    effect: float
    overlap: float
    chance: float
    carried: Faithfulness | None


@dataclass(frozen=True)
class Explanation(Printable):
    """Why a steering works.

    Attributes:
        explained: model, behavior, vector, data.
        findings: sentences, each with the choice it leads to.
        working: the strength that is explained, and what it was chosen from.
        attribution: edges and nodes.
        random_edges: those of a random vector.
        circuit: the fewest edges that carry it.
        frozen: what it loses when parts are frozen.
        values: what its value vectors say.
        sparsity: what is left when dimensions go.
        geometry: how linear and low-rank it is.
        exchanged: its circuit and another vector's, each run under each; None without another.
    """

    explained: Explained
    findings: tuple[Finding, ...]
    working: Working
    attribution: AttributionSummary
    random_edges: RandomEdges
    circuit: Circuit
    frozen: FreezeTable
    values: ValueVectors
    sparsity: SparsityCurve
    geometry: GeometryReport
    exchanged: Interchange | None = None

    def table(self) -> Table:
        """Return the findings and what to do about them."""
        one = self.explained
        rows = tuple((found.part, found.said, found.choice) for found in self.findings)
        note = (
            f"{one.vector}, {one.site} of layers {list(one.layers)}, scope {one.scope}; seed "
            f"{one.seed}, {number(one.seconds, 0)} s"
        )
        title = f"Why {one.behavior} moves in {one.model}"
        return Table(title, ("part", "what was found", "what follows"), rows, (note,))

    def tables(self) -> tuple[Table, ...]:
        """Return every part's tables, the findings last."""
        parts: tuple[Printable, ...] = (
            self.working,
            self.attribution,
            self.circuit,
            self.frozen,
            self.values,
            self.sparsity,
        )
        other = self.exchanged
        swapped = () if other is None else (other.table(), other.overlap_table())
        return (*(part.table() for part in parts), *self.geometry.tables(), *swapped, self.table())


def explain(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    against: VectorSteering | None = None,
    strength: float | None = None,
    direction: Direction | None = None,
    max_prompts: int | None = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    nulls: int = NULLS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Measure what carries a steering, what it says, how sparse and how linear it is.

    Args:
        lm: the unsteered model; float32 gives the scores of edges their full precision.
        behavior: what the vector is for.
        vector: an additive steering at the strength it is used at.
        against: another vector, added at the same place: the circuits of both are exchanged. It
            steers the way that `vector` does.
        strength: m to explain. None: the vector's own or, where that moves nothing, the weakest of
            1/4 to 32 times it that moves the behavior on validation prompts (working.py); of
            `against` likewise.
        direction: `toward` or `away`, whichever the strength's sign says by default; `both`: that
            way first, then the other, at the same strength.
        max_prompts: at most so many a direction, for every part; None for all.
        max_new_tokens: length of responses and answers.
        nulls: random counterparts per frozen part.
        seed: of the split, nulls and intervals.
        progress: called with (stages done, stages in all).

    Raises:
        TrimtabError: a steering that does not add, is off, or changes no greedy token; two that
            are added at different places; a model whose heads or norms have no known form; a
            behavior too small to split.
    """
    started = perf_counter()
    look = strength is None
    vector = vector if strength is None else vector.at(strength)
    own = 1 if vector.strength > 0 else -1
    if direction not in (None, "both"):
        own = sign_of(direction)
        vector = vector.at(own * abs(vector.strength))
    given = [vector] if against is None else [vector, against.at(own * abs(against.strength))]
    for one in given:
        check_adds(one)
        one.check(lm)
    check_places(given)
    done = counting(progress, STAGES + len(given) - 1)
    signs = (own, -own) if direction == "both" else (own,)
    case = Case(lm, behavior, vector, signs, max_prompts, max_new_tokens, seed)
    working = done(working_strength(case, look=look))
    case = case.under(vector.at(working.used))
    carrier = done(_carrier(case))
    random = done(_random_edges(case, carrier))
    frozen = done(freeze_table(case, nulls=nulls))
    values = done(value_vectors(case, carrier.edges.heads))
    sparsity = done(sparsity_curve(case, SHARES, ORDERS, effect_prompts=8))
    shape = done(geometry(case))
    exchanged = None if len(given) == 1 else done(_exchange(case, carrier, given[1], look))
    summary, circuit, vector = carrier.edges.summary(20), carrier.circuit, case.vector
    about = Explained(
        model=lm.name,
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        vector=vector.label,
        site=vector.site,
        layers=vector.layers,
        scope=str(vector.scope),
        signs=signs,
        samples=carrier.edges.samples,
        seed=seed,
        seconds=perf_counter() - started,
    )
    said = conclusions(
        signs, working, summary, random.carried, circuit, frozen, values, sparsity, shape, exchanged
    )
    return Explanation(
        about, said, working, summary, random, circuit, frozen, values, sparsity, shape, exchanged
    )


@dataclass(frozen=True, eq=False)
class _Carrier:
    """The edges of a vector, the samples of test prompts, and the circuit that carries it there."""

    edges: Attribution
    scored: Samples
    circuit: Circuit


def _carrier(case: Case) -> _Carrier:
    lm = case.lm
    chosen_on, scored_on = case.runs(case.splits.validation), case.runs(case.splits.test)
    edges = attribute(lm, chosen_on)
    samples, scored = (Samples(lm, edges.graph, sets) for sets in (chosen_on, scored_on))
    return _Carrier(edges, scored, minimal_circuit(edges, samples, scored, seed=case.seed))


def _random_edges(case: Case, carrier: _Carrier) -> RandomEdges:
    """Attribute a random vector as long on responses of its own; run its edges under this one."""
    graph = carrier.edges.graph
    top = carrier.edges.top(round(TENTH * graph.n_edges))
    highest = int(top.sum())
    chance = highest / graph.n_edges
    null = random_null(case.vector, null_seeds(case.seed, 1)[0])
    try:
        sets = case.under(null, signs=case.signs[:1]).runs(case.splits.validation)
    except TrimtabError:  # it changes no greedy token: there is nothing to attribute
        return RandomEdges(0.0, 0.0, chance, None)
    other = attribute(case.lm, sets)
    shared = float((other.top(highest) & top).sum()) / highest
    carried = carrier.scored.faithfulness(other.top(carrier.circuit.size), case.seed)
    return RandomEdges(other.effect, shared, chance, carried)


def _exchange(case: Case, carrier: _Carrier, other: VectorSteering, look: bool) -> Interchange:
    """Run the circuits of the case's vector and of another one under both."""
    other = other.at(working_strength(case.under(other), look=look).used)
    names = case.vector.label, other.label
    if names[0] == names[1]:
        names = names[0], f"{names[1]} (other)"
    carriers = dict(zip(names, (carrier, _carrier(case.under(other))), strict=True))
    return interchange(
        dict(zip(names, (case.vector, other), strict=True)),
        {name: one.edges.top(one.circuit.size) for name, one in carriers.items()},
        {name: one.scored for name, one in carriers.items()},
        case.seed,
    )
