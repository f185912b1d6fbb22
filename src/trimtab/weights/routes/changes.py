"""What several steerings do to a network, in the form that weights can take.

A steering that a checkpoint can hold is one of two things: a constant of the stream from some
point on, or a linear map of what one module writes to the stream. Points are ("embed", 0), the
stream into block 0; ("mid", l), after the attention of block l; ("post", l), its output. Writers
are ("embed", 0), ("attention", l) and ("mlp", l).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.steering.hooks import Edit
from trimtab.steering.vector import VectorSteering

Point = tuple[str, int]
Writer = tuple[str, int]
_WRITERS = {"embed": "embed", "attn_out": "attention", "mlp_out": "mlp"}


@dataclass(eq=False)
class Affine:
    """Every vector w that a writer adds to the stream becomes A w + b, A = I - U V^T.

    Attributes:
        left: U, float64 `[d_model, rank]`.
        right: V, float64 `[d_model, rank]`.
        shift: b, float64 `[d_model]`, in units of the stream.
    """

    left: Tensor
    right: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, d_model: int) -> Affine:
        empty = torch.zeros(d_model, 0, dtype=torch.float64)
        return cls(empty, empty, torch.zeros(d_model, dtype=torch.float64))

    def then(self, edit: Edit) -> None:
        """Follow with one more edit of the same site, as its hook computes it.

        (I - m c c^T)(I - U V^T) = I - U V^T - (m c)(c - V U^T c)^T, and b becomes
        (I - m c c^T) b + m t c.
        """
        c = edit.direction.double()
        if edit.operation == "add":
            self.shift = self.shift + edit.amount * c
            return
        target = edit.target if edit.operation == "affine" else 0.0
        row = c - self.right @ (self.left.T @ c)
        self.left = torch.cat([self.left, edit.amount * c[:, None]], dim=1)
        self.right = torch.cat([self.right, row[:, None]], dim=1)
        self.shift = self.shift - edit.amount * ((self.shift @ c) - target) * c


@dataclass
class Refusal:
    """Why a steering cannot be weights, and the nearest that can."""

    reason: str
    advice: str


@dataclass(eq=False)
class Changes:
    """The constants and maps that the steerings amount to; `refused` says which cannot be.

    Attributes:
        constants: point -> vector added to the stream there, float64 `[d_model]`.
        maps: writer -> what becomes of the vectors it adds.
        refused: (number of the steering, layer) -> why.
    """

    constants: dict[Point, Tensor] = field(default_factory=dict)
    maps: dict[Writer, Affine] = field(default_factory=dict)
    refused: dict[tuple[int, int], Refusal] = field(default_factory=dict)

    def add(self, point: Point, vector: Tensor) -> None:
        """Add a constant."""
        zero = torch.zeros_like(vector, dtype=torch.float64)
        self.constants[point] = self.constants.get(point, zero) + vector.double()

    def map(self, writer: Writer, edit: Edit) -> None:
        """Follow the writer's map with an edit."""
        self.maps.setdefault(writer, Affine.identity(edit.direction.shape[0])).then(edit)


HOOK = "steer with the hook: `with vector.on(lm):`"
_SCOPE = "weights act on every token alike"
_STREAM = (
    "no weight projects the stream itself: what would be taken out, earlier blocks wrote and read"
)
_EVERYWHERE = (
    "project what is written instead: the same direction at embed, and at attn_out and mlp_out of"
    " every layer (`at_every_writer(vector)`), or steer with the hook"
)
_NO_MIDDLE = "attention and MLP run side by side: there is no stream between them"


def changes_of(vectors: Sequence[VectorSteering], parallel: bool) -> Changes:
    """Turn steerings, the outermost first, into constants and maps of writers.

    `parallel` says that attention and MLP of the model read the same stream.
    """
    found = Changes()
    listed = list(_edits(vectors))
    # Projections of the stream itself, which no single module writes.
    stream = [(k, e) for k, e in listed if e.operation != "add" and _writer(e) is None]
    for key, edit in listed:
        refusal = _refusal(edit, parallel)
        if refusal is not None:
            found.refused[key] = refusal
    if stream and not found.refused:
        found.refused |= _stream(listed, stream, found, parallel)
        return found
    for key, edit in listed:
        if key in found.refused:
            continue
        writer = _writer(edit)
        if writer is None:
            point = point_of(edit.site.kind, edit.site.layer, parallel)
            found.add(point, edit.amount * edit.direction.double())
        else:
            # In order with the projections of the same writer, which see what was added before them.
            found.map(writer, edit)
    return found


def point_of(kind: str, layer: int, parallel: bool) -> Point:
    """Return where in the stream a change of a site takes effect."""
    if kind in ("embed", "resid_pre"):
        return ("post", layer - 1) if layer else ("embed", 0)
    if kind in ("resid_mid", "attn_out") and not parallel:
        return ("mid", layer)
    return ("post", layer)


def _edits(vectors: Sequence[VectorSteering]) -> Iterator[tuple[tuple[int, int], Edit]]:
    for number, vector in enumerate(vectors):
        for edit in vector.edits():
            if edit.amount:  # the hook installs nothing for an amount of zero
                yield (number, edit.site.layer), edit


def _refusal(edit: Edit, parallel: bool) -> Refusal | None:
    if str(edit.scope) != "all":
        return Refusal(_SCOPE, f"{HOOK}; or bake it with scope all")
    if parallel and edit.site.kind == "resid_mid":
        return Refusal(_NO_MIDDLE, "use resid_post, attn_out or mlp_out")
    return None


def _writer(edit: Edit) -> Writer | None:
    kind, layer = edit.site.kind, edit.site.layer
    if kind == "resid_pre" and layer == 0:
        return ("embed", 0)
    return (_WRITERS[kind], layer) if kind in _WRITERS else None


def _stream(
    listed: list[tuple[tuple[int, int], Edit]],
    stream: list[tuple[tuple[int, int], Edit]],
    found: Changes,
    parallel: bool,
) -> dict[tuple[int, int], Refusal]:
    """Take projections of the stream apart, where that is the same.

    If c is removed whole at every point of the stream from the embedding up to some point, then no
    writer up to there leaves anything along c, and removing it from each of them is the same:
    h_p = P(h_{p-1} + w) = h_{p-1} + P w as long as P h_{p-1} = h_{p-1}.
    """
    c = stream[0][1].direction.double()
    alike = all(
        e.operation == "ablate" and e.amount == 1.0 and float((c @ e.direction.double()).abs()) > 1 - 1e-6
        for _, e in listed
    )  # fmt: skip
    covered = {point_of(e.site.kind, e.site.layer, parallel) for _, e in listed}
    last = max(layer for _, layer in covered)
    kinds = ("post",) if parallel else ("mid", "post")
    order: list[Point] = [("embed", 0), *((k, n) for n in range(last + 1) for k in kinds)]
    prefix = all(point in covered for point in order[: len(covered)])
    if not (alike and prefix and len(covered) <= len(order)):
        return {key: Refusal(_STREAM, _EVERYWHERE) for key, _ in stream}
    edit = stream[0][1]
    for kind, layer in order[: len(covered)]:
        if kind == "embed":
            found.map(("embed", 0), edit)
        if kind == "mid" or (kind == "post" and parallel):
            found.map(("attention", layer), edit)
        if kind == "post":
            found.map(("mlp", layer), edit)
    return {}
