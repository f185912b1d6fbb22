"""Both runs of a batch, recorded: what each target reads, and what each source adds more when steered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.batch import Batch
from trimtab.explain.anatomy import anatomy_of
from trimtab.explain.circuits.graph import Graph, Node
from trimtab.explain.teacher_forced import Targets
from trimtab.probe import stream_input, stream_output
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.steering import VectorSteering


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
    """A batch read twice.

    Attributes:
        base: what the unsteered run's targets read.
        changes: steered minus unsteered contribution of every source, float32
            `[sources, batch, seq, d_model]`.
        steered_metric: m of the steered run per row, `[batch]`.
        base_metric: of the unsteered run.
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

    def entry(kept: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept[layer] = stream_input(args, kwargs)

        return keep

    def leave(layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            streams.mlp_added[layer] = stream_output(output)

        return keep

    def end(module: nn.Module, args: tuple, kwargs: dict) -> None:
        streams.final = stream_input(args, kwargs)

    with ExitStack() as stack:

        def before(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        for layer in layers:
            before(sites.blocks[layer], entry(streams.attention, layer))
            # What attention and MLP read side by side is the block's own input.
            middle = sites.blocks[layer] if sites.parallel else sites.middle[layer]
            before(middle, entry(streams.mlp, layer))
            writer, added = sites.attention_writer[layer], sites.mlp_added[layer]
            assert writer is not None  # the heads were found
            before(writer, entry(streams.mixed, layer))
            stack.callback(added.register_forward_hook(leave(layer)).remove)
        assert sites.final_norm is not None  # the graph was built
        before(sites.final_norm, end)
        yield


@contextmanager
def pushes(lm: LanguageModel, vector: VectorSteering) -> Iterator[dict[int, Tensor]]:
    """Steer inside, and keep by how much each steered place was changed, `[batch, seq, d_model]`."""
    before: dict[int, Tensor] = {}
    pushed: dict[int, Tensor] = {}

    def hook(layer: int, scale: float, on_input: bool, first: bool) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, *output: object) -> None:
            hidden = stream_input(args, kwargs) if on_input else stream_output(output[0])
            if first:
                before[layer] = hidden
            else:
                pushed[layer] = (hidden.float() - before[layer].float()) * scale

        return keep

    with ExitStack() as stack:
        # Hooks run in the order in which they were put in place: ours around the steering's.
        for first in (True, False):
            for layer in vector.layers:
                tap = lm.sites.writing(Site(vector.site, layer))
                keep = hook(layer, tap.scale, tap.on_input, first)
                if tap.on_input:
                    handle = tap.module.register_forward_pre_hook(keep, with_kwargs=True)
                else:
                    handle = tap.module.register_forward_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
            if first:
                stack.enter_context(vector.on(lm))
        yield pushed
