"""One edge at a time, exactly: what attribution is checked against.

Patched in: the unsteered run, with u(steered) - u(base) added to what v alone reads. Patched out: the
steered run, with the same taken away from it. Everything after v follows by itself. The exact effect
of an edge is the mean of what the metric gains by patching it in and loses by patching it out: the
integral of attribution runs from one of these states to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.mechanism.circuits.anatomy import LayerAnatomy, anatomy_of
from trimtab.mechanism.circuits.graph import Graph, Node
from trimtab.mechanism.circuits.record import Record, record
from trimtab.mechanism.circuits.teacher_forced import Targets, TokenRuns
from trimtab.models.batch import Batch
from trimtab.models.hooking import Hooks
from trimtab.results import Progress

if TYPE_CHECKING:
    from trimtab.models.model import LanguageModel

ROWS = 64  # of a patched pass: several edges at once


@dataclass(frozen=True, eq=False)
class Patched:
    """Exact effects of some edges, mean over samples, in logits.

    Attributes:
        edges: flat indices into `[targets, sources]`.
        into: float64 `[edges]`, gained by patching in.
        out: float64 `[edges]`, lost by patching out.
    """

    edges: Tensor
    into: Tensor
    out: Tensor

    @property
    def effect(self) -> Tensor:
        """The mean of both, float64 `[edges]`."""
        return (self.into + self.out) / 2


@torch.no_grad()
def patch_edges(
    lm: LanguageModel,
    graph: Graph,
    runs: TokenRuns,
    edges: Sequence[int],
    *,
    progress: Progress | None = None,
) -> Patched:
    """Patch edges one by one and measure the metric.

    Args:
        lm: the unsteered model.
        graph: of the steering.
        runs: the samples.
        edges: flat indices into `[targets, sources]`.
        progress: called with (passes done, passes in all).
    """
    into = torch.zeros(len(edges), dtype=torch.float64)
    out = torch.zeros(len(edges), dtype=torch.float64)
    work = list(runs.batches(lm, max_tokens=512))
    done, samples = 0, 0
    for batch, targets in work:
        recorded = record(lm, graph, runs.vector, batch, targets)
        count = max(1, ROWS // len(batch.rows))
        pieces = [list(range(i, min(i + count, len(edges)))) for i in range(0, len(edges), count)]
        for piece in pieces:
            chosen = [edges[i] for i in piece]
            for sign, found in ((1.0, into), (-1.0, out)):
                metric = _metric(lm, graph, runs, recorded, batch, targets, chosen, sign)
                plain = recorded.base_metric if sign > 0 else recorded.steered_metric
                found[piece] += (sign * (metric - plain)).sum(-1).double().cpu()
            done += 1
            if progress is not None:
                progress(done, len(pieces) * len(work))
        samples += len(batch.rows)
    return Patched(torch.tensor(list(edges)), into / samples, out / samples)


def _metric(
    lm: LanguageModel,
    graph: Graph,
    runs: TokenRuns,
    recorded: Record,
    batch: Batch,
    targets: Targets,
    edges: Sequence[int],
    sign: float,
) -> Tensor:
    """The metric `[edges, batch]` with one edge patched in (or out) in each copy of the batch."""
    n, rows = len(edges), len(batch.rows)
    repeated = Batch(**{f.name: torch.cat([getattr(batch, f.name)] * n) for f in fields(Batch)})
    width = len(graph.sources)
    changes: dict[Node, list[tuple[slice, Tensor]]] = {}
    for place, edge in enumerate(edges):
        target, source = divmod(edge, width)
        where = slice(place * rows, (place + 1) * rows)
        changes.setdefault(graph.targets[target], []).append(
            (where, sign * recorded.changes[source])
        )
    with nullcontext() if sign > 0 else runs.vector.on(lm), Hooks() as hooks:
        _install(hooks, lm, changes)
        logits = lm.forward(repeated, logits_to_keep=targets.keep)
    many = Targets(torch.cat([targets.steered] * n), torch.cat([targets.base] * n))
    return many.metric(logits).view(n, rows)


Changes = dict[Node, list[tuple[slice, Tensor]]]


def _install(hooks: Hooks, lm: LanguageModel, changes: Changes) -> None:
    """Add to what each target reads, in its own rows of the batch."""
    sites, anatomy = lm.sites, anatomy_of(lm)

    streams: dict[tuple[str, int], Tensor] = {}

    def keep(module: nn.Module, key: tuple[str, int]) -> None:
        hooks.before(module, partial(streams.__setitem__, key))

    def shifted(parts: list[tuple[slice, Tensor]], stream: Tensor) -> Tensor:
        moved = stream.clone()
        for where, change in parts:
            moved[where] += change.to(moved)
        return moved

    def mlp(parts: list[tuple[slice, Tensor]], layer: int, _: Tensor) -> Tensor:
        norm, stream = anatomy[layer].heads.mlp_norm, shifted(parts, streams["mlp", layer])
        return stream if norm is None else norm(stream)

    def rows(
        parts: list[tuple[slice, Tensor]], node: Node, here: LayerAnatomy
    ) -> Callable[[Tensor], Tensor]:
        role, head = here.role(node.kind), node.head
        assert head is not None  # queries, keys and values have one

        def replace(output: Tensor) -> Tensor:
            stream = streams["attention", node.layer]
            result = output.clone()
            for where, change in parts:
                # All outputs are made again, a head's rows of them are used.
                again = _linear(
                    role.module, here.normed(stream[where] + change.to(stream), stream.dtype)
                )
                result[where, :, role.rows[head]] = again[..., role.rows[head]]
            return result

        return replace

    for node, parts in changes.items():
        if node.kind == "logits":
            assert sites.final_norm is not None  # the graph was built
            hooks.before(sites.final_norm, partial(shifted, parts))
        elif node.kind == "mlp":
            middle = sites.blocks[node.layer] if sites.parallel else sites.middle[node.layer]
            keep(middle, ("mlp", node.layer))
            hooks.before(sites.mlp[node.layer], partial(mlp, parts, node.layer))
        else:
            keep(sites.blocks[node.layer], ("attention", node.layer))
            module = anatomy[node.layer].role(node.kind).module
            hooks.after(module, rows(parts, node, anatomy[node.layer]))


def _linear(module: nn.Module, values: Tensor) -> Tensor:
    """A projection without the hooks on it."""
    return module.forward(values)
