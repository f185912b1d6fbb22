"""Which edges carry a steering: every edge scored at once by integrated gradients over the strength.

    IE(u -> v) = (u_steered - u_base) . (1/T) sum_i  d m / d v  at strength m (i + 1/2) / T

over fixed tokens, with the midpoint rule: the derivative is that of the metric by what the target v
reads, so it counts every path from v to the logits. Two passes per step, whatever the number of edges.
The score of a node is the sum over its edges: what it adds to the stream reaches the logits through
them alone. The scores of the steering's own edges sum to m(steered) - m(base) up to the midpoint rule.
Source: edge attribution with integrated gradients (EAP-IG), over several tokens as in arXiv 2604.08524.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.anatomy import ROLES, anatomy_of, pulled_back
from trimtab.mechanism.circuits.graph import Graph, Node, build_graph
from trimtab.mechanism.circuits.record import Record, Streams, record, watching
from trimtab.mechanism.circuits.teacher_forced import Targets, TokenRuns
from trimtab.models.batch import Batch
from trimtab.models.gradients import frozen
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.vector import VectorSteering

Key: TypeAlias = tuple[str, int]  # kind of target, layer
STEPS = 10
# Of the recorded changes and the gradients held at once.
MEMORY = 2**29


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of all edges, mean over samples, in logits.

    Attributes:
        graph: the edges.
        edges: float64 `[targets, sources]`, 0 where there is no edge.
        effect: m(steered) - m(base), mean over samples: what all of it adds up to.
        samples: how many.
        steps: T.
    """

    graph: Graph
    edges: Tensor
    effect: float
    samples: int
    steps: int

    @property
    def nodes(self) -> dict[Node, float]:
        """Source to its score: the sum over its edges."""
        sums = self.edges.sum(0)
        return {node: float(sums[i]) for node, i in self.graph.source_at.items()}

    @property
    def heads(self) -> dict[tuple[int, int], float]:
        """(layer, head) to its score."""
        return {(n.layer, n.head): score for n, score in self.nodes.items() if n.head is not None}

    @property
    def completeness(self) -> float:
        """What the steering's own edges sum to, over the effect: 1 when the integral is exact."""
        whole = sum(score for node, score in self.nodes.items() if node.kind == "steer")
        return whole / self.effect if self.effect else float("nan")

    def top(self, count: int) -> Tensor:
        """Return the `count` edges of largest magnitude, bool `[targets, sources]`."""
        order = self.order()[:count]
        chosen = torch.zeros_like(self.graph.edges).flatten()
        chosen[order] = True
        return chosen.view_as(self.graph.edges)

    def order(self) -> Tensor:
        """Return the flat indices of all edges, those of largest magnitude first."""
        scores = self.edges.abs().masked_fill(~self.graph.edges, -1.0).flatten()
        return scores.argsort(descending=True, stable=True)[: self.graph.n_edges]

    def ranked(self, count: int = 20) -> list[tuple[str, str, float]]:
        """Return (source, target, score) of the largest edges."""
        width = len(self.graph.sources)
        found = []
        for flat in self.order()[:count].tolist():
            target, source = divmod(flat, width)
            names = str(self.graph.sources[source]), str(self.graph.targets[target])
            found.append((*names, float(self.edges[target, source])))
        return found

    def into(self) -> dict[str, float]:
        """Return the share of all magnitude by what the edges lead into."""
        sizes = self.edges.abs().sum(1)
        total = float(sizes.sum()) or 1.0
        shares: dict[str, float] = {}
        for node, row in self.graph.target_at.items():
            shares[node.kind] = shares.get(node.kind, 0.0) + float(sizes[row]) / total
        return shares

    def summary(self, count: int = 12) -> AttributionSummary:
        """Return what a reader wants of it, as plain values."""
        nodes = sorted(self.nodes.items(), key=lambda item: -abs(item[1]))
        return AttributionSummary(
            n_edges=self.graph.n_edges,
            effect=self.effect,
            completeness=self.completeness,
            samples=self.samples,
            steps=self.steps,
            into=self.into(),
            nodes=tuple(NodeScore(n.kind, n.layer, n.head, score) for n, score in nodes),
            top=tuple(self.ranked(count)),
        )


@dataclass(frozen=True)
class NodeScore:
    """A source, see `Node`, and its score in logits, mean over samples."""

    kind: str
    layer: int
    head: int | None
    score: float


@dataclass(frozen=True)
class AttributionSummary(Printable):
    """An attribution in plain values.

    Attributes:
        n_edges: of the graph.
        effect: m(steered) - m(base), in logits, mean over samples.
        completeness: the steering's own edges over the effect.
        samples: prompts read.
        steps: of the integral.
        into: kind of target to its share of all edges' magnitude.
        nodes: every source, largest magnitude first.
        top: (source, target, score) of the largest edges.
    """

    n_edges: int
    effect: float
    completeness: float
    samples: int
    steps: int
    into: dict[str, float]
    nodes: tuple[NodeScore, ...]
    top: tuple[tuple[str, str, float], ...]

    def table(self) -> Table:
        """Return the largest edges."""
        rows = tuple((source, target, number(score)) for source, target, score in self.top)
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in self.into.items())
        notes = (
            f"{self.n_edges} edges, {self.samples} samples; all of it: {number(self.effect)} logits, "
            f"of which the steering's own edges account for {number(self.completeness)}",
            f"magnitude by where the edges lead: {shares}",
        )
        return Table("Largest edges", ("from", "into", "score, logits"), rows, notes)


def attribute(
    lm: LanguageModel, sets: TokenRuns | Mapping[str, TokenRuns], *, steps: int = STEPS
) -> Attribution:
    """Score every edge of a steered model.

    Args:
        lm: the unsteered model; float32 gives the scores their full precision.
        sets: one set of runs, or several, whose vectors differ in nothing but the strength; scores are
            means over all samples.
        steps: T of the midpoint rule.
    """
    listed = [sets] if isinstance(sets, TokenRuns) else list(sets.values())
    graph = build_graph(lm, listed[0].vector)
    width = (len(graph.sources) + len(graph.targets)) * lm.d_model * 4
    room = max(64, MEMORY // width)
    work = ((runs, *pair) for runs in listed for pair in runs.batches(lm, min(2048, room)))
    total = torch.zeros(graph.edges.shape, dtype=torch.float64)
    effect, samples = 0.0, 0
    for runs, batch, targets in work:
        recorded = record(lm, graph, runs.vector, batch, targets)
        gradients = _Gradients(lm, graph, batch, targets, recorded)
        for step in range(steps):
            gradients.add(runs.vector.at(runs.vector.strength * (step + 0.5) / steps))
        total += gradients.scores(recorded.changes) / steps
        effect += float((recorded.steered_metric - recorded.base_metric).sum())
        samples += len(batch.rows)
    if not bool(total.isfinite().all()):
        raise TrimtabError(
            asked=f"an attribution of {listed[0].vector.label} on {lm.name}",
            found="scores that are not finite",
            advice="load the model in float32 or bfloat16",
        )
    return Attribution(graph, total / samples, effect / samples, samples, steps)


@dataclass(eq=False)
class _Gradients:
    """d m / d (what each target reads), summed over the steps, of one batch."""

    lm: LanguageModel
    graph: Graph
    batch: Batch
    targets: Targets
    recorded: Record
    sums: dict[Key, Tensor] = field(default_factory=dict)

    def add(self, vector: VectorSteering) -> None:
        """Add the gradients at one strength."""
        with frozen(self.lm.model), vector.on(self.lm):
            with _traced(self.lm, self.graph, min(vector.layers)) as seen:
                logits = self.lm.forward(self.batch, logits_to_keep=self.targets.keep)
            metric = self.targets.metric(logits).sum()
            names = list(seen.outputs)
            parts = torch.autograd.grad(metric, [seen.outputs[name] for name in names])
        found = dict(zip(names, parts, strict=True))
        anatomy = anatomy_of(self.lm)
        with torch.no_grad():
            end = ("logits", self.lm.n_layers)
            self._add(end, found[end][None].float())
            for kind, layer in names:
                if kind == "mlp":
                    form, stream = anatomy[layer].mlp_norm, seen.streams.mlp[layer]
                    self._add((kind, layer), pulled_back(form, stream, found[kind, layer][None]))
            for (kind, layer), owner in seen.roles.items():
                role = anatomy[layer].role(kind)
                rows = found[owner][..., role.rows].float()
                weights = role.weights().to(rows.device).float()
                each = torch.einsum("bshw,hwd->hbsd", rows, weights)
                back = pulled_back(anatomy[layer].norm, seen.streams.attention[layer], each)
                self._add((kind, layer), back)

    def _add(self, key: Key, part: Tensor) -> None:
        self.sums[key] = self.sums[key] + part if key in self.sums else part

    def scores(self, changes: Tensor) -> Tensor:
        """Return sum over positions of change . gradient, float64 `[targets, sources]`."""
        result = torch.zeros(self.graph.edges.shape, dtype=torch.float64)
        for (kind, layer), gradient in self.sums.items():
            first = self.graph.target_at[Node(kind, layer, 0 if kind in ROLES else None)]
            used = int(self.graph.edges[first].sum())
            rows = gradient.flatten(1).to(changes.device) @ changes[:used].flatten(1).T
            result[first : first + len(gradient), :used] = rows.cpu().double()
        return result.masked_fill(~self.graph.edges, 0.0)


@dataclass(eq=False)
class _Seen:
    """Tensors of one pass: what to differentiate by, and the streams that were read.

    Roles may share one projection: `roles` says under whose name its output stands.
    """

    outputs: dict[Key, Tensor] = field(default_factory=dict)
    roles: dict[Key, Key] = field(default_factory=dict)
    streams: Streams = field(default_factory=Streams)


@contextmanager
def _traced(lm: LanguageModel, graph: Graph, start: int) -> Iterator[_Seen]:
    """Keep the outputs of projections and the inputs of MLPs and the final norm as graph nodes.

    Differentiation begins at the input of the block `start`.
    """
    sites, seen, anatomy = lm.sites, _Seen(), anatomy_of(lm)
    layers = sorted({target.layer for target in graph.targets if target.kind != "logits"})

    def begin(hidden: Tensor) -> None:
        if not hidden.requires_grad:
            hidden.requires_grad_()

    def apart(key: Key, hidden: Tensor) -> Tensor:
        """A copy of the input, so that its gradient is that of this reader alone."""
        copy = seen.outputs[key] = hidden.clone()
        return copy

    with Hooks() as hooks, watching(lm, layers, seen.streams):
        hooks.before(sites.blocks[start], begin)
        for layer in layers:
            if Node("query", layer, 0) in graph.target_at:
                owners: dict[nn.Module, Key] = {}
                for kind in ROLES:
                    module = anatomy[layer].role(kind).module
                    if module not in owners:
                        owners[module] = (kind, layer)
                        hooks.after(module, partial(seen.outputs.__setitem__, (kind, layer)))
                    seen.roles[kind, layer] = owners[module]
            if Node("mlp", layer) in graph.target_at:
                hooks.before(sites.mlp[layer], partial(apart, ("mlp", layer)))
        assert sites.final_norm is not None  # the graph was built
        hooks.before(sites.final_norm, partial(apart, ("logits", lm.n_layers)))
        yield seen
