"""Why a steering works, in one report: where it acts, through what, what it says, how sparse, how linear.

Edges and their circuit, parts of the network frozen, value vectors read in tokens, dimensions taken
away, and the geometry of the gap; beside each a random vector of equal length. Edges and dimensions
are chosen on validation and train prompts, scores are those of test prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.attribution import Attribution, AttributionSummary, attribute
from trimtab.mechanism.circuits.faithful import (
    Circuit,
    Faithfulness,
    Samples,
    minimal_circuit,
)
from trimtab.mechanism.circuits.teacher_forced import TokenRuns, four_sets
from trimtab.mechanism.conclusions import Finding, conclusions
from trimtab.mechanism.frozen.freeze import FreezeTable, freeze_table
from trimtab.mechanism.geometry.geometry import GeometryReport, geometry
from trimtab.mechanism.reading.value_vector import ValueVectors, value_vectors
from trimtab.mechanism.sparse.curve import SparsityCurve, sparsity_curve
from trimtab.mechanism.working import Working, working_strength
from trimtab.results import Progress
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.nulls import null_seeds, random_null

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior
    from trimtab.models.model import LanguageModel
    from trimtab.steering.vector import VectorSteering

STAGES = 7
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
        layers: see `site`.
        scope: see `site`.
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
        return (*(part.table() for part in parts), *self.geometry.tables(), self.table())


def explain(
    lm: LanguageModel,
    behavior: Behavior,
    vector: VectorSteering,
    *,
    look: bool = True,
    both: bool = False,
    max_prompts: int = 16,
    max_new_tokens: int = 24,
    nulls: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Measure what carries a steering, what it says, how sparse and how linear it is.

    Args:
        lm: the unsteered model; float32 gives the scores of edges their full precision.
        behavior: what the vector is for.
        vector: an additive steering at the strength it is used at.
        look: where that strength moves nothing, explain the weakest of 1/4 to 32 times it that
            moves the behavior on validation prompts (working.py).
        both: also steer the other way, at the same strength.
        max_prompts: at most so many a direction, for every part.
        max_new_tokens: length of responses and answers.
        nulls: random counterparts per frozen part.
        seed: of the split, nulls and intervals.
        progress: called with (stages done, stages in all).

    Raises:
        TrimtabError: a steering that does not add, is off, or changes no greedy token; a model
            whose heads or norms have no known form; a behavior too small to split.
    """
    started = perf_counter()
    if vector.strength == 0 or vector.operation != "add":
        raise TrimtabError(
            asked=f"why {vector.label} works",
            found=f"operation {vector.operation} at strength {vector.strength:g}",
            advice="give a vector that adds, at the strength it is used at (trimtab tune)",
        )
    vector.check(lm)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, STAGES)

    own = 1 if vector.strength > 0 else -1
    signs: tuple[int, ...] = (own, -own) if both else (own,)
    splits = behavior.split(seed)
    working = working_strength(
        lm,
        splits.validation,
        vector,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        look=look,
    )
    vector = vector.at(working.used)
    step()
    chosen_on, scored_on = (
        four_sets(
            lm, part, vector, max_prompts=max_prompts, max_new_tokens=max_new_tokens, signs=signs
        )
        for part in (splits.validation, splits.test)
    )
    found = attribute(lm, chosen_on)
    other = _random_attribution(lm, splits.validation, vector, max_prompts, max_new_tokens, seed)
    step()
    scored = Samples(lm, found.graph, scored_on)
    circuit = minimal_circuit(found, Samples(lm, found.graph, chosen_on), scored, seed=seed)
    random = _random_edges(found, other, circuit.size, scored, seed)
    step()
    frozen = freeze_table(
        lm,
        behavior,
        vector,
        signs=signs,
        nulls=nulls,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    step()
    heads = {
        (node.layer, node.head): score
        for node, score in found.nodes.items()
        if node.kind == "head" and node.head is not None
    }
    values = value_vectors(lm, behavior, vector, heads, seed=seed)
    step()
    strengths: dict[int, float] = dict.fromkeys(signs, vector.strength)
    sparsity = sparsity_curve(
        lm,
        behavior,
        vector,
        SHARES,
        ORDERS,
        strengths=strengths,
        effect_prompts=8,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    step()
    shape = geometry(lm, behavior, vector, seed=seed)
    step()
    summary = found.summary(20)
    about = Explained(
        model=lm.name,
        behavior=behavior.name,
        data_hash=behavior.data_hash,
        vector=vector.label,
        site=vector.site,
        layers=vector.layers,
        scope=str(vector.scope),
        signs=signs,
        samples=found.samples,
        seed=seed,
        seconds=perf_counter() - started,
    )
    said = conclusions(
        signs, working, summary, random.carried, circuit, frozen, values, sparsity, shape
    )
    return Explanation(
        about, said, working, summary, random, circuit, frozen, values, sparsity, shape
    )


def _random_attribution(
    lm: LanguageModel,
    split: Behavior,
    vector: VectorSteering,
    max_prompts: int,
    max_new_tokens: int,
    seed: int,
) -> Attribution | None:
    """Attribute one random vector of the same length, on responses of its own."""
    null = random_null(vector, null_seeds(seed, 1)[0])
    sign = 1 if vector.strength > 0 else -1
    try:
        sets: dict[str, TokenRuns] = four_sets(
            lm,
            split,
            null,
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            signs=(sign,),
        )
    except TrimtabError:  # it changes no greedy token: there is nothing to attribute
        return None
    return attribute(lm, sets)


def _random_edges(
    found: Attribution, other: Attribution | None, size: int, scored: Samples, seed: int
) -> RandomEdges:
    """Compare the highest edges of both, and run the random vector's under the explained one."""
    top = found.top(round(TENTH * found.graph.n_edges))
    count = int(top.sum())
    chance = count / found.graph.n_edges
    if other is None:
        return RandomEdges(0.0, 0.0, chance, None)
    shared = float((other.top(count) & top).sum()) / count
    carried = scored.faithfulness(other.top(size), seed)
    return RandomEdges(other.effect, shared, chance, carried)
