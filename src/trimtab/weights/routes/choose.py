"""Which route each constant takes, with or without a conversion, and the taking of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering
from trimtab.weights.disk.draft import Draft, finish
from trimtab.weights.disk.layout import Layout
from trimtab.weights.routes.changes import HOOK, Changes, Point, Refusal, point_of
from trimtab.weights.routes.constant import add_bias, add_null_block, bias_of
from trimtab.weights.routes.convert import StreamConversion, conversions_of
from trimtab.weights.routes.low_rank import project_embedding, project_writer, update_writers

_POST_NORM = (
    "{} normalizes what a sublayer writes, with a divisor that depends on the part to be removed"
)


def refuse_post_norm(changes: Changes, vectors: Sequence[VectorSteering], layout: Layout) -> None:
    """Take back the maps of sublayers after a norm; additions there are constants."""
    if not layout.post_norm:
        return
    for writer in [w for w in changes.maps if w[0] != "embed"]:
        map_ = changes.maps.pop(writer)
        if not map_.left.shape[1]:
            changes.maps[writer] = map_
            continue
        kinds = {"attention": ("attn_out", "resid_mid"), "mlp": ("mlp_out", "resid_post")}[writer[0]]  # fmt: skip
        for number, vector in enumerate(vectors):
            mine = writer[1] in vector.layers and vector.operation != "add"
            if mine and vector.site in (*kinds, "resid_pre"):
                changes.refused[number, writer[1]] = Refusal(
                    _POST_NORM.format(layout.short), f"project at embed only, or {HOOK}"
                )


def add_shifts(changes: Changes, layout: Layout) -> None:
    """Add what the maps leave as constants, so that a route has to be found for it as well."""
    sites = {"attention": "attn_out", "mlp": "mlp_out"}
    for (kind, layer), map_ in changes.maps.items():
        if kind != "embed" and bool(map_.shift.any()):
            changes.add(point_of(sites[kind], layer, layout.parallel), map_.shift)


def choose(
    draft: Draft, points: dict[Point, torch.Tensor], route: str | None
) -> tuple[Draft, dict[Point, str], str]:
    """Return the draft to continue with, each point's route, and why there is none otherwise.

    Fewest added layers first, then no conversion.
    """
    reasons = []
    options: list[tuple[int, int, Draft, dict[Point, str]]] = []
    candidates: list[StreamConversion | None] = [None]
    if points or route == "convert":
        candidates += conversions_of(draft.layout.model_type)
    for conversion in candidates:
        if conversion is not None and (refusal := conversion.refusal(draft.base.config)):
            reasons.append(f"it cannot become {conversion.target}: {refusal}")
            continue
        if conversion is None and route == "convert":
            continue
        candidate = draft
        if conversion is not None:
            candidate = draft.fork()
            conversion.apply(candidate)
        found = {point: _route(candidate.layout, point, route) for point in points}
        exact = {point: name for point, name in found.items() if name is not None}
        if len(exact) == len(points):
            extra = sum("block" in name for name in exact.values())
            options.append((extra, conversion is not None, candidate, exact))
        else:
            lacking = "bias after its sublayers" if route != "null_block" else "null block"
            reasons.append(f"{candidate.layout.short} has no {lacking}")
    if options:
        _, _, candidate, exact = min(options, key=lambda option: option[:2])
        return candidate, exact, ""
    only = "" if route is None else f"by the route {route} alone: "
    return draft, {}, only + ("; ".join(dict.fromkeys(reasons)) or "no such conversion is known")


def _route(layout: Layout, point: Point, only: str | None) -> str | None:
    bias = bias_of(layout, point)
    if bias is not None and only != "null_block":
        return "bias" if point[0] == "post" else "bias of the attention's output"
    if layout.null is not None and only != "bias":
        return "null block" if point[0] == "post" else "split block with a constant"
    return None


def execute(
    draft: Draft,
    changes: Changes,
    routes: dict[Point, str],
    updates: Sequence[WeightSteering] = (),
) -> None:
    """Apply the changes to a draft.

    Projections first, which read the base's tensors; added blocks last, which move numbers.
    """
    for writer, map_ in changes.maps.items():
        if writer[0] == "embed":
            project_embedding(draft, map_)
        else:
            project_writer(draft, writer, map_)
    for update in updates:
        if update.strength:
            update_writers(draft, update)
    for point, constant in sorted(changes.constants.items(), key=lambda item: "block" in routes[item[0]]):  # fmt: skip
        if "block" in routes[point]:
            add_null_block(draft, point, constant)
        else:
            add_bias(draft, point, constant)
    finish(draft)
