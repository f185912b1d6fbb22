"""Do different vectors of one behavior use the same circuit? One's circuit run under another's vector.

    overlap(A, B) = |A and B| / min(|A|, |B|)

Two vectors need not point the same way to pass through the same edges: the cosine stands beside.
Source: arXiv 2604.08524, interchangeability of circuits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation.summary import mean
from trimtab.mechanism.circuits.faithful import Faithfulness, Samples, random_edges
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.vector import VectorSteering


@dataclass(frozen=True)
class Interchange(Printable):
    """Circuits of several vectors, each run under each.

    Attributes:
        names: of the vectors.
        sizes: edges of each circuit.
        faithfulness: `[circuit][vector]`, the circuit of one under the vector of another.
        random: per vector, that of a random circuit as large as its own.
        overlap: `[circuit][circuit]`, shared edges over the smaller circuit's; `chance` is what two
            random circuits of these sizes share.
        cosines: `[vector][vector]`, of the directions at the common layers.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[tuple[Faithfulness, ...], ...]
    random: tuple[Faithfulness, ...]
    overlap: tuple[tuple[float, ...], ...]
    chance: tuple[tuple[float, ...], ...]
    cosines: tuple[tuple[float, ...], ...]

    def table(self) -> Table:
        """Return faithfulness: a row per circuit, a column per vector."""
        rows = [
            (f"circuit of {name} ({size})", *(one.cell for one in line))
            for name, size, line in zip(self.names, self.sizes, self.faithfulness, strict=True)
        ]
        rows.append(("random, as large", *(one.cell for one in self.random)))
        columns = ("circuit", *(f"under {name}" for name in self.names))
        return Table("Interchangeability: faithfulness", columns, tuple(rows))

    def overlap_table(self) -> Table:
        """Return overlaps (chance), and cosines."""
        rows = []
        for name, *lines in zip(self.names, self.overlap, self.chance, self.cosines, strict=True):
            figures = zip(*lines, strict=True)
            cells = [f"{number(a)} ({number(b)}); cos {number(c)}" for a, b, c in figures]
            rows.append((name, *cells))
        note = "shared edges over the smaller circuit (by chance); cosine of the vectors"
        return Table("Overlap of circuits", ("", *self.names), tuple(rows), (note,))


def interchange(
    vectors: Mapping[str, VectorSteering],
    circuits: Mapping[str, Tensor],
    samples: Mapping[str, Samples],
    seed: int = 0,
) -> Interchange:
    """Run each vector's circuit, bool `[targets, sources]`, on samples recorded under each vector."""
    names = tuple(vectors)
    check_places(list(vectors.values()))
    graph = samples[names[0]].graph
    total = graph.n_edges
    sizes = [int(circuits[name].sum()) for name in names]
    generator = torch.Generator().manual_seed(seed)
    return Interchange(
        names=names,
        sizes=tuple(sizes),
        faithfulness=tuple(
            tuple(samples[under].faithfulness(circuits[of], seed) for under in names)
            for of in names
        ),
        random=tuple(
            samples[name].faithfulness(random_edges(graph, size, generator), seed)
            for name, size in zip(names, sizes, strict=True)
        ),
        overlap=tuple(
            tuple(
                float((circuits[a] & circuits[b]).sum()) / min(sizes[i], sizes[j])
                for j, b in enumerate(names)
            )
            for i, a in enumerate(names)
        ),
        # A random edge of the smaller circuit is in the larger one with probability its share.
        chance=tuple(tuple(max(a, b) / total for b in sizes) for a in sizes),
        cosines=tuple(tuple(_cosine(vectors[a], vectors[b]) for b in names) for a in names),
    )


def check_places(vectors: Sequence[VectorSteering]) -> None:
    """Refuse vectors that are steered at different places: their graphs differ."""
    places = {(vector.site, vector.layers) for vector in vectors}
    if len(places) > 1:
        raise TrimtabError(
            asked="to exchange circuits of " + ", ".join(vector.label for vector in vectors),
            found=f"vectors at different places: {sorted(places)}",
            advice="find them at one site and the same layers (layers=)",
        )


def _cosine(first: VectorSteering, second: VectorSteering) -> float:
    """Mean cosine over the steered layers."""
    pairs = ((first.directions[k].double(), second.directions[k].double()) for k in first.layers)
    return mean([float(a @ b) for a, b in pairs])
