"""Running a circuit: every target reads the unsteered stream plus the changes its edges let through.

    x_t = x_t(unsteered) + sum over sources u with an edge of (u(now) - u(unsteered))

The steering enters as a source like any other. With all edges this is the steered run, with none the
unsteered one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trimtab.mechanism.circuits.anatomy import ROLES, LayerAnatomy, anatomy_of
from trimtab.mechanism.circuits.graph import Graph, Node
from trimtab.mechanism.circuits.record import Record
from trimtab.models.batch import Batch
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel


@torch.no_grad()
def run_circuit(
    lm: LanguageModel, graph: Graph, chosen: Tensor, recorded: Record, batch: Batch, keep: int
) -> Tensor:
    """Return the logits `[batch, keep, vocab]` of a model in which only some edges carry changes.

    `chosen` is bool `[targets, sources]`; what is no edge is ignored.
    """
    run = _Run(lm, graph, (chosen & graph.edges).to(recorded.changes.device), recorded)
    with Hooks() as hooks:
        run.install(hooks)
        return lm.forward(batch, logits_to_keep=keep)


class _Run:
    """The hooks of one pass: they compute what is read, and keep what is written."""

    def __init__(self, lm: LanguageModel, graph: Graph, chosen: Tensor, recorded: Record) -> None:
        self.lm, self.graph, self.recorded = lm, graph, recorded
        self.anatomy = anatomy_of(lm)
        self.chosen = chosen.to(recorded.changes.dtype)
        # Contribution now minus unsteered, filled as the layers write; the steering is given.
        self.changes = torch.zeros_like(recorded.changes)
        for node, row in graph.source_at.items():
            if node.kind == "steer":
                self.changes[row] = recorded.changes[row]
        # Projection module -> (its outputs that a role owns, what is put there), of the layer at work.
        self.projections: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def read(self, first: int, count: int, base: Tensor) -> Tensor:
        """Return what `count` targets from row `first` read, `[count, batch, seq, d_model]`."""
        weights = self.chosen[first : first + count]
        # Sources are in the order in which they write: those after the last edge cannot matter.
        used = int(weights.any(0).nonzero().max()) + 1 if bool(weights.any()) else 0
        if not used:
            return base.float().expand(count, *base.shape)
        change = weights[:, :used] @ self.changes[:used].flatten(1)
        return base.float() + change.view(count, *base.shape).to(base.device)

    def install(self, hooks: Hooks) -> None:
        """Put the hooks in place."""
        sites, targets = self.lm.sites, self.graph.target_at
        for layer, anatomy in enumerate(self.anatomy):
            if Node("query", layer, 0) in targets:
                hooks.before(sites.attention[layer], partial(self._attention, layer, anatomy))
                roles = {anatomy.role(kind).module for kind in ROLES}
                for module in roles:
                    hooks.after(module, partial(self._projection, module))
                hooks.before(anatomy.heads.output, partial(self._heads, layer, anatomy))
            if Node("mlp", layer) in targets:
                hooks.before(sites.mlp[layer], partial(self._mlp, layer, anatomy))
                hooks.after(sites.mlp_added[layer], partial(self._mlp_added, layer))
        assert sites.final_norm is not None  # the graph was built
        hooks.before(sites.final_norm, self._final)

    def _attention(self, layer: int, anatomy: LayerAnatomy, _: Tensor) -> None:
        """Before an attention: compute every head's queries, keys and values from its own stream."""
        base = self.recorded.base.attention[layer]
        self.projections.clear()
        for kind in ROLES:
            role = anatomy.role(kind)
            first = self.graph.target_at[Node(kind, layer, 0)]
            streams = self.read(first, role.rows.shape[0], base)
            made = anatomy.projected(kind, streams).flatten(2)
            self.projections.setdefault(role.module, []).append((role.rows.flatten(), made))

    def _projection(self, module: nn.Module, output: Tensor) -> Tensor:
        result = output.clone()
        for rows, made in self.projections[module]:
            result[..., rows] = made.to(result.dtype)
        return result

    def _heads(self, layer: int, anatomy: LayerAnatomy, mixed: Tensor) -> None:
        parts = anatomy.contributions(mixed)
        parts = parts - anatomy.contributions(self.recorded.base.mixed[layer])
        start = self.graph.source_at[Node("head", layer, 0)]
        self.changes[start : start + len(parts)] = parts.to(self.changes.device)

    def _mlp(self, layer: int, anatomy: LayerAnatomy, hidden: Tensor) -> Tensor:
        row = self.graph.target_at[Node("mlp", layer)]
        stream = self.read(row, 1, self.recorded.base.mlp[layer])[0].to(hidden.dtype)
        norm = anatomy.heads.mlp_norm
        return stream if norm is None else norm(stream)

    def _mlp_added(self, layer: int, added: Tensor) -> None:
        change = added.float() - self.recorded.base.mlp_added[layer].float()
        row = self.graph.source_at[Node("mlp", layer)]
        change = change * self.lm.sites.residual_multiplier
        self.changes[row] = change.to(self.changes.device)

    def _final(self, _: Tensor) -> Tensor:
        base = self.recorded.base.final
        return self.read(len(self.graph.targets) - 1, 1, base)[0].to(base.dtype)
