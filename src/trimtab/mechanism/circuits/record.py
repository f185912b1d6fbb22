"""Both runs of a batch, recorded: what each target reads, and what each source adds more when steered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.mechanism.circuits.anatomy import anatomy_of
from trimtab.mechanism.circuits.graph import Graph, Node
from trimtab.mechanism.circuits.teacher_forced import Targets
from trimtab.models.batch import Batch
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.sites import Site
from trimtab.steering.vector import VectorSteering


@dataclass(eq=False)
class Streams:
    """What one run's layers read and write, filled by `watching`.

    Attributes:
        attention: layer -> the stream that its attention reads, `[batch, seq, d_model]`.
        mlp: layer -> the stream that its MLP reads.
        final: the stream before the final norm.
        mixed: layer -> what the output projection is given, `[batch, seq, heads * head_dim]`.
        mlp_added: layer -> what the MLP adds to the stream.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, Tensor] = field(default_factory=dict)
    mlp_added: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, eq=False)
class Record:
    """A batch read twice: what the unsteered run's targets read, m of both runs `[batch]`, and changes.

    `changes` is the steered minus the unsteered contribution of every source, float32
    `[sources, batch, seq, d_model]`.
    """

    base: Streams
    changes: Tensor
    steered_metric: Tensor
    base_metric: Tensor


@torch.no_grad()
def record(
    lm: LanguageModel, graph: Graph, vector: VectorSteering, batch: Batch, targets: Targets
) -> Record:
    """Run a batch with and without the steering and keep what patching needs."""
    layers = sorted({t.layer for t in graph.targets if t.kind != "logits"})
    base, clean = Streams(), Streams()
    with watching(lm, layers, base):
        plain = targets.metric(lm.forward(batch, logits_to_keep=targets.keep))
    with pushes(lm, vector) as pushed, watching(lm, layers, clean):
        metric = targets.metric(lm.forward(batch, logits_to_keep=targets.keep))
    shape = (len(graph.sources), *batch.input_ids.shape, lm.d_model)
    changes = torch.zeros(shape, device=base.final.device)
    anatomy = anatomy_of(lm)
    for layer in {s.layer for s in graph.sources if s.kind == "head"}:
        before, after = (anatomy[layer].contributions(run.mixed[layer]) for run in (base, clean))
        start = graph.source_at[Node("head", layer, 0)]
        changes[start : start + len(before)] = (after - before).to(changes.device)
    for node, row in graph.source_at.items():
        if node.kind == "mlp":
            difference = clean.mlp_added[node.layer].float() - base.mlp_added[node.layer].float()
            changes[row] = (difference * lm.sites.residual_multiplier).to(changes.device)
        elif node.kind == "steer":
            changes[row] = pushed[node.layer].to(changes.device)
    return Record(base, changes, metric, plain)


@contextmanager
def watching(lm: LanguageModel, layers: list[int], streams: Streams) -> Iterator[None]:
    """Keep what the layers read and write in each call made inside; the last call's stays."""
    sites = lm.sites

    def entry(module: nn.Module, kept: dict[int, Tensor], layer: int) -> None:
        hooks.before(module, partial(kept.__setitem__, layer))

    with Hooks() as hooks:
        for layer in layers:
            entry(sites.blocks[layer], streams.attention, layer)
            # What attention and MLP read side by side is the block's own input.
            middle = sites.blocks[layer] if sites.parallel else sites.middle[layer]
            entry(middle, streams.mlp, layer)
            writer, added = sites.attention_writer[layer], sites.mlp_added[layer]
            assert writer is not None  # the heads were found
            entry(writer, streams.mixed, layer)
            hooks.after(added, partial(streams.mlp_added.__setitem__, layer))
        assert sites.final_norm is not None  # the graph was built
        hooks.before(sites.final_norm, partial(setattr, streams, "final"))
        yield


@contextmanager
def pushes(lm: LanguageModel, vector: VectorSteering) -> Iterator[dict[int, Tensor]]:
    """Steer inside, and keep by how much each steered place was changed, `[batch, seq, d_model]`."""
    before: dict[int, Tensor] = {}
    pushed: dict[int, Tensor] = {}

    taps = {layer: lm.sites.writing(Site(vector.site, layer)) for layer in vector.layers}

    def keep(layer: int, hidden: Tensor) -> None:
        pushed[layer] = (hidden.float() - before[layer].float()) * taps[layer].scale

    # Hooks run in the order in which they were put in place: ours around the steering's.
    with Hooks() as outer:
        for layer, tap in taps.items():
            outer.at(tap, partial(before.__setitem__, layer))
        with vector.on(lm), Hooks() as inner:
            for layer, tap in taps.items():
                inner.at(tap, partial(keep, layer))
            yield pushed
