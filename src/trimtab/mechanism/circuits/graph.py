"""The graph that a steering spreads over: what writes to the stream, what reads it, and in what order.

Sources are the steering itself (one per steered layer), every attention head and every MLP at or above
the first steered place. Targets are the query, key and value inputs of every head (keys and values once
per group of queries that shares them), every MLP and the logits. There is an edge from each source to
each target that comes after it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.anatomy import ROLES
from trimtab.models.heads import heads_of
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

# Where in a block a site's change enters the stream; a block lasts from 0 to 4.
ENTERS = {
    "embed": -0.5,
    "resid_pre": -0.5,
    "attn_out": 1.5,
    "resid_mid": 1.5,
    "mlp_out": 3.5,
    "resid_post": 3.5,
}
ATTENTION_READS, HEADS_WRITE, MLP_READS, MLP_WRITES = 0.0, 1.0, 2.0, 3.0


@dataclass(frozen=True)
class Node:
    """A source or a target.

    Attributes:
        kind: source `steer`, `head`, `mlp`; target `query`, `key`, `value`, `mlp`, `logits`.
        layer: 0-based; of the logits, the number of layers.
        head: within its layer (of a key or value: the group); None for what is no head.
    """

    kind: str
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        """A short name: `steer.2`, `head 3.1`, `mlp 4`, `value 5.0`, `logits`."""
        if self.kind == "logits":
            return "logits"
        if self.kind == "steer":
            return f"steer.{self.layer}"
        return f"{self.kind} {self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True, eq=False)
class Graph:
    """All edges of a steered model.

    Attributes:
        sources: in the order in which they write.
        targets: in the order in which they read.
        edges: bool `[targets, sources]`: whether the target comes after the source.
    """

    sources: tuple[Node, ...]
    targets: tuple[Node, ...]
    edges: Tensor

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.edges.sum())

    @cached_property
    def source_at(self) -> dict[Node, int]:
        """Source to its column."""
        return {node: i for i, node in enumerate(self.sources)}

    @cached_property
    def target_at(self) -> dict[Node, int]:
        """Target to its row."""
        return {node: i for i, node in enumerate(self.targets)}

    def pruned(self, chosen: Tensor) -> Tensor:
        """Keep those of the chosen edges that lie on a path from the steering to the logits."""
        kept = chosen & self.edges
        steers = torch.tensor([source.kind == "steer" for source in self.sources])
        ends = torch.tensor([target.kind == "logits" for target in self.targets])
        while True:
            fed = steers | (self._inputs & kept.any(1)).any(1)
            read = ends | (self._inputs & kept.any(0)[:, None]).any(0)
            smaller = kept & fed & read[:, None]
            if torch.equal(smaller, kept):
                return kept
            kept = smaller

    @cached_property
    def _inputs(self) -> Tensor:
        """Through which targets each source reads, bool `[sources, targets]`."""
        heads = Counter(source.layer for source in self.sources if source.kind == "head")
        groups = Counter((target.kind, target.layer) for target in self.targets)
        found = torch.zeros(len(self.sources), len(self.targets), dtype=torch.bool)
        for node, row in self.source_at.items():
            if node.kind == "mlp":
                found[row, self.target_at[node]] = True
            elif node.head is not None:
                for kind in ROLES:
                    # As many heads in a row share a key or value.
                    size = heads[node.layer] // groups[kind, node.layer]
                    found[row, self.target_at[Node(kind, node.layer, node.head // size)]] = True
        return found


def build_graph(lm: LanguageModel, vector: VectorSteering) -> Graph:
    """Lay out the graph of a model steered by a vector; refuse one that cannot be taken apart."""
    if lm.sites.final_norm is None or "attn_out" in lm.sites.refused:
        raise TrimtabError(
            asked=f"the edges of {lm.name}",
            found=lm.sites.refused.get("attn_out", "no final norm"),
            advice="use a model whose blocks add attention and MLP to one stream",
        )
    layers = heads_of(lm)
    return layout(
        [(layer.n_heads, layer.n_kv_heads) for layer in layers],
        [(vector.site, layer) for layer in vector.layers],
        parallel=lm.sites.parallel,
    )


def layout(
    heads: list[tuple[int, int]], steered: list[tuple[str, int]], parallel: bool = False
) -> Graph:
    """Lay out a graph from (heads, key-value heads) per layer and (kind of site, layer) per push.

    In a `parallel` block attention and MLP read the same stream.
    """
    places = [(4 * layer + ENTERS[site], Node("steer", layer)) for site, layer in steered]
    first = min(time for time, _ in places)
    writes, reads = list(places), []
    mlp_reads = ATTENTION_READS if parallel else MLP_READS
    for layer, (n_heads, n_kv) in enumerate(heads):
        start = 4.0 * layer
        if start + ATTENTION_READS > first:
            for kind, count in (("query", n_heads), ("key", n_kv), ("value", n_kv)):
                reads += [(start + ATTENTION_READS, Node(kind, layer, i)) for i in range(count)]
            writes += [(start + HEADS_WRITE, Node("head", layer, i)) for i in range(n_heads)]
        if start + mlp_reads > first:
            reads.append((start + mlp_reads, Node("mlp", layer)))
            writes.append((start + MLP_WRITES, Node("mlp", layer)))
    reads.append((4.0 * len(heads), Node("logits", len(heads))))
    writes.sort(key=lambda item: item[0])
    reads.sort(key=lambda item: item[0])
    edges = torch.tensor([[written < read for written, _ in writes] for read, _ in reads])
    return Graph(tuple(n for _, n in writes), tuple(n for _, n in reads), edges)
