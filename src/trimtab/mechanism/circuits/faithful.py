"""How much of a steering a set of edges carries, and the smallest set that carries enough.

    faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none))

with everything outside C at its unsteered activation. Beside every circuit stand random circuits of its
size and its complement. Edges are chosen by the attribution of one part of the data, and the
faithfulness reported is that of another. Source: arXiv 2604.08524, threshold 0.85.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.mechanism.circuits.attribution import Attribution
from trimtab.mechanism.circuits.graph import Graph
from trimtab.mechanism.circuits.record import Record, record
from trimtab.mechanism.circuits.run import run_circuit
from trimtab.mechanism.circuits.teacher_forced import Targets, TokenRuns
from trimtab.models.batch import Batch
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import ratio_bootstrap
from trimtab.results.tables import Printable, Table, number, with_interval

THRESHOLD = 0.85
MEMORY = 2**29
RANDOM = 3


@dataclass(frozen=True)
class Faithfulness:
    """What one set of edges carries.

    Attributes:
        edges: how many, those on no path from the steering to the logits left out.
        value: over all samples; `low` to `high` is a bootstrap interval over samples.
    """

    edges: int
    value: float
    low: float
    high: float

    @property
    def cell(self) -> str:
        """Value and interval for a table."""
        return with_interval(self.value, self.low, self.high)


class Samples:
    """The samples that circuits are run on, recorded once."""

    def __init__(self, lm: LanguageModel, graph: Graph, sets: Mapping[str, TokenRuns]) -> None:
        self.lm, self.graph = lm, graph
        room = max(64, MEMORY // (2 * len(graph.sources) * lm.d_model * 4))
        self.parts: list[tuple[Batch, Targets, Record]] = []
        for runs in sets.values():
            for batch, targets in runs.batches(lm, max_tokens=min(2048, room)):
                recorded = record(lm, graph, runs.vector, batch, targets)
                self.parts.append((batch, targets, recorded))

    def faithfulness(self, chosen: Tensor, seed: int = 0) -> Faithfulness:
        """Run a circuit, bool `[targets, sources]`."""
        pruned = self.graph.pruned(chosen)
        gained, whole = [], []
        for batch, targets, recorded in self.parts:
            logits = run_circuit(self.lm, self.graph, pruned, recorded, batch, targets.keep)
            gained.append(targets.metric(logits) - recorded.base_metric)
            whole.append(recorded.steered_metric - recorded.base_metric)
        top, bottom = torch.cat(gained).double().cpu(), torch.cat(whole).double().cpu()
        low, high = ratio_bootstrap(top.tolist(), bottom.tolist(), seed)
        return Faithfulness(int(pruned.sum()), float(top.sum() / bottom.sum()), low, high)


@dataclass(frozen=True)
class Circuit(Printable):
    """The smallest circuit found and what stands beside it.

    Attributes:
        threshold: the faithfulness asked for.
        n_edges: of the whole graph.
        size: how many of the highest edges are taken; `share` of all.
        chosen: its faithfulness on the samples that the size was chosen on.
        held_out: on other samples.
        complement: of all edges but these, on the other samples.
        random: of random circuits of the same size, on the other samples.
        curve: (edges taken, faithfulness) on the samples of the choice, by size.
    """

    threshold: float
    n_edges: int
    size: int
    share: float
    chosen: Faithfulness
    held_out: Faithfulness
    complement: Faithfulness
    random: tuple[Faithfulness, ...]
    curve: tuple[tuple[int, float], ...]

    def table(self) -> Table:
        """Return one line per set of edges."""
        rows = [
            ("highest by attribution", str(self.size), self.held_out.cell),
            ("all the others", str(self.n_edges - self.size), self.complement.cell),
            *((f"random {i + 1}", str(self.size), one.cell) for i, one in enumerate(self.random)),
        ]
        note = (
            f"{number(100 * self.share, 1)} % of {self.n_edges} edges reach {self.threshold:g} where "
            "they were chosen; figures on other samples, 95 % intervals"
        )
        return Table("Minimal circuit", ("edges", "count", "faithfulness"), tuple(rows), (note,))


def minimal_circuit(
    found: Attribution,
    chosen_on: Samples,
    scored_on: Samples,
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> Circuit:
    """Find the fewest highest edges that reach a faithfulness.

    Sizes grow by a half until one passes on `chosen_on`; the last step is bisected to 2 % of the
    size. A circuit that passes may have a larger one that does not: the smallest size seen to pass
    is reported, and the curve shows the others.
    """
    graph, total = found.graph, found.graph.n_edges
    curve: dict[int, Faithfulness] = {}

    def passes(size: int) -> bool:
        curve[size] = chosen_on.faithfulness(found.top(size), seed)
        return curve[size].value >= threshold

    low, high = 0, max(1, len(graph.targets) // 8)
    while high < total and not passes(high):
        low, high = high, min(total, max(high + 1, high * 3 // 2))
    if high == total:
        passes(total)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    chosen = found.top(high)
    generator = torch.Generator().manual_seed(seed)
    return Circuit(
        threshold=threshold,
        n_edges=total,
        size=high,
        share=high / total,
        chosen=curve[high],
        held_out=scored_on.faithfulness(chosen, seed),
        complement=scored_on.faithfulness(graph.edges & ~chosen, seed),
        random=tuple(
            scored_on.faithfulness(random_edges(graph, high, generator), seed)
            for _ in range(RANDOM)
        ),
        curve=tuple((size, curve[size].value) for size in sorted(curve)),
    )


def random_edges(graph: Graph, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` edges drawn without replacement, bool `[targets, sources]`."""
    flat = graph.edges.flatten().nonzero()[:, 0]
    drawn = flat[torch.randperm(len(flat), generator=generator)[:count]]
    chosen = torch.zeros(graph.edges.numel(), dtype=torch.bool)
    chosen[drawn] = True
    return chosen.view_as(graph.edges)
