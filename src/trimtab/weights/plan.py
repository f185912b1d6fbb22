"""The planner: by which route each steering becomes weights, what it costs, or why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from trimtab.checks import choice
from trimtab.errors import TrimtabError
from trimtab.results.tables import Printable, Table
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled, WeightSteering
from trimtab.weights.disk.checkpoint import Checkpoint
from trimtab.weights.disk.draft import Draft, start_draft
from trimtab.weights.disk.layout import Layout, short
from trimtab.weights.disk.sources import TensorSource, Zeros
from trimtab.weights.disk.stream import arrange
from trimtab.weights.routes.changes import HOOK, Changes, Point, changes_of, point_of
from trimtab.weights.routes.choose import add_shifts, choose, execute, refuse_post_norm

# So many steps are shown.
_STEPS = 8
ROUTES = ("bias", "null_block", "convert")
# Their modeling code in vLLM has no bias after the attention, and leaves out what it does not know.
_NO_OUTPUT_BIAS = {"gemma", "granitemoe", "qwen3"}
_SERVE = (
    "vLLM's own code for this architecture drops {} without a word: serve with --model-impl "
    "transformers"
)


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one steering at some of its layers.

    Attributes:
        steering: its label.
        operation: `add`, `ablate` or `affine`.
        site: kind of site.
        layers: of the site.
        scope: token scope.
        route: how it becomes weights, or None where it cannot.
        reason: why it cannot; empty where it can.
        advice: the nearest exact alternative.
    """

    steering: str
    operation: str
    site: str
    layers: tuple[int, ...]
    scope: str
    route: str | None
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Plan(Printable):
    """The routes of all steerings and what the checkpoint costs.

    Attributes:
        model: the base.
        architecture: its architecture.
        becomes: the architecture of the result.
        rows: one for every steering and route.
        extra_layers: blocks added.
        changed: names of tensors that are new or differ from the base's.
        bytes_written: bytes of the files that have to be written.
        bytes_shared: bytes of the files that can be shared with the base.
        files_written: their number; `files` of all.
        files: safetensors files of the result.
        steered: those of them that carry a steering; other new ones are zero.
        new_tensors: whether the base has none of `changed`.
        steps: what is done, in order.
        notes: what to know about the result.
    """

    model: str
    architecture: str
    becomes: str
    rows: tuple[PlanRow, ...]
    extra_layers: int = 0
    changed: tuple[str, ...] = ()
    bytes_written: int = 0
    bytes_shared: int = 0
    files_written: int = 0
    files: int = 0
    steered: tuple[str, ...] = ()
    new_tensors: bool = False
    steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every steering has a route."""
        return all(row.route is not None for row in self.rows)

    @property
    def route(self) -> str:
        """The routes, each once."""
        routes = "; ".join(dict.fromkeys(row.route for row in self.rows if row.route))
        converted = self.becomes not in ("", self.architecture)
        return f"conversion to {short(self.becomes)} + {routes}" if converted else routes

    def check(self) -> None:
        """Refuse what has no exact route.

        Raises:
            TrimtabError: names architecture, scope, operation and site, the reason, and the nearest
                exact alternative.
        """
        for row in self.rows:
            if row.route is None:
                raise TrimtabError(
                    asked=f"to bake into architecture {self.architecture}, scope {row.scope}, "
                    f"operation {row.operation}, site {row.site}, layers {_span(row.layers)}",
                    found=f"no exact route: {row.reason}",
                    advice=row.advice,
                )

    def table(self) -> Table:
        """Return one line per steering and route, the costs underneath."""
        rows = tuple(
            (
                row.steering,
                f"{row.operation} at {row.site}, scope {row.scope}",
                _span(row.layers),
                f"exact by {row.route}" if row.route else f"refused: {row.reason}",
            )
            for row in self.rows
        )
        notes = [f"advice: {advice}" for advice in dict.fromkeys(r.advice for r in self.rows if r.advice)]  # fmt: skip
        if self.exact:
            rest = self.steps[_STEPS:]
            steps = [*self.steps[:_STEPS], *([f"... {len(rest)} more"] if rest else [])]
            notes += [
                f"layers added: {self.extra_layers}; tensors new or changed: {len(self.changed)}",
                f"files written: {self.files_written} of {self.files}, {self.bytes_written:,} bytes"
                f"; shared with the base: {self.bytes_shared:,} bytes",
                *(f"{n}. {step}" for n, step in enumerate(steps, start=1)),
                *self.notes,
            ]
        becomes = "" if self.becomes == self.architecture else f" becomes {self.becomes}"
        title = f"baking into {self.model} ({self.architecture}{becomes})"
        return Table(title, ("steering", "what", "layers", "route"), rows, tuple(notes))


@dataclass(frozen=True)
class BakeReport(Printable):
    """What was written and how equal it is to the hooked model after a real reload.

    The differences are None when verification was switched off.

    Attributes:
        route: how the steering was made weights.
        path: folder of the checkpoint.
        max_logit_difference: largest |hooked - reloaded| over all logits of the check prompts.
        equal_text: whether the greedy answers are the same; None where only a slice was loaded.
        unexpected_keys: keys of the checkpoint that the reload did not know; always empty.
        missing_keys: keys that the reload did not find; always empty.
        tolerance: what `max_logit_difference` was held against.
        steering_effect: largest |hooked - unsteered| over the same logits, for scale.
        rounding: largest ||stored - meant|| / ||meant|| over the constants and updates stored.
        dtype: of the checkpoint.
        verified: what was compared, or "not checked".
        float32_difference: of a half-precision checkpoint, the difference with float32 arithmetic.
        tensors_compared: tensors found bit by bit as meant.
        plan: routes and costs.
        base_fingerprint: of the base; as the vectors recorded it where the base was not loaded.
    """

    route: str
    path: Path
    max_logit_difference: float | None
    equal_text: bool | None
    unexpected_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    tolerance: float | None = None
    steering_effect: float | None = None
    rounding: float = 0.0
    dtype: str = "float32"
    verified: str = "not checked"
    float32_difference: float | None = None
    tensors_compared: int = 0
    plan: Plan | None = None
    base_fingerprint: str = ""

    def table(self) -> Table:
        """Return one line per fact."""
        facts = [
            ("route", self.route),
            ("folder", str(self.path)),
            ("compared", self.verified),
            ("largest logit difference to the hook", _figure(self.max_logit_difference)),
            ("allowed", _figure(self.tolerance)),
            ("largest effect of the steering on a logit", _figure(self.steering_effect)),
            ("greedy text equal", {None: "not checked", True: "yes", False: "no"}[self.equal_text]),
            (f"rounding to {self.dtype}", _figure(self.rounding)),
        ]
        if self.float32_difference is not None:
            said = "the same difference with float32 arithmetic"
            facts.append((said, _figure(self.float32_difference)))
        if self.plan is not None:
            facts.append(("layers added", str(self.plan.extra_layers)))
            sizes = f"{self.plan.bytes_written:,}, {self.plan.bytes_shared:,}"
            facts.append(("bytes written, shared", sizes))
        return Table("baked checkpoint", ("what", "found"), tuple(facts))


def _figure(value: float | None) -> str:
    return "not checked" if value is None else f"{value:.2g}"


def prepare(
    base: Checkpoint, name: str, levers: Sequence[Scaled], route: str | None = None
) -> tuple[Plan, Draft | None]:
    """Plan, and draft the result where every steering has a route.

    Raises:
        TrimtabError: an architecture that has no routes at all, or a checkpoint that cannot be
            changed; another width or depth.
    """
    if route is not None:
        choice("route", route, ROUTES)
    draft = start_draft(base)
    untouched = draft.tensors()
    vectors = [lever for lever in levers if isinstance(lever, VectorSteering)]
    updates = [lever for lever in levers if isinstance(lever, WeightSteering)]
    _check_shapes(base, name, vectors)
    layout = draft.layout
    changes = changes_of(vectors, layout.parallel)
    refuse_post_norm(changes, vectors, layout)
    add_shifts(changes, layout)
    chosen, routes, why = choose(draft, changes.constants, route)
    rows = (*_rows(vectors, changes, chosen.layout, routes, why), *map(_update_row, updates))
    plan = Plan(name, layout.architecture, chosen.layout.architecture, rows)
    if not plan.exact:
        return plan, None
    execute(chosen, changes, routes, updates)
    return _costed(plan, chosen, untouched), chosen


def refuse_early(name: str, layout: Layout, vectors: Sequence[VectorSteering]) -> None:
    """Refuse steerings that have no route whatever the weights are.

    Raises:
        TrimtabError: as `Plan.check`.
    """
    changes = changes_of(vectors, layout.parallel)
    if changes.refused:
        rows = _rows(vectors, changes, layout, {}, "")
        Plan(name, layout.architecture, layout.architecture, rows).check()


def _check_shapes(base: Checkpoint, name: str, vectors: Sequence[VectorSteering]) -> None:
    """Refuse another width or depth; a fingerprint takes a loaded model."""
    depth, width = int(base.config.num_hidden_layers), int(base.config.hidden_size)
    for vector in vectors:
        vector.check_facts(name, depth, width, vector.fingerprint)


def _rows(
    vectors: Sequence[VectorSteering],
    changes: Changes,
    layout: Layout,
    routes: dict[Point, str],
    why: str,
) -> tuple[PlanRow, ...]:
    rows: list[PlanRow] = []
    for number, vector in enumerate(vectors):
        grouped: dict[tuple[str | None, str, str], list[int]] = {}
        for layer in vector.layers:
            refusal = changes.refused.get((number, layer))
            key = _route_of(vector, layer, layout, routes, why)
            if refusal is not None:
                key = (None, refusal.reason, refusal.advice)
            grouped.setdefault(key, []).append(layer)
        facts = vector.label, vector.operation, vector.site
        rows += [
            PlanRow(*facts, tuple(layers), str(vector.scope), *key)
            for key, layers in grouped.items()
        ]
    return tuple(rows)


def _update_row(lever: WeightSteering) -> PlanRow:
    said = f"rank-{lever.rank} update of the writers" if lever.strength else "nothing (strength 0)"
    return PlanRow(lever.label, lever.operation, lever.site, lever.layers, lever.scope, said)


def _route_of(
    vector: VectorSteering,
    layer: int,
    layout: Layout,
    routes: dict[Point, str],
    why: str,
) -> tuple[str | None, str, str]:
    amount = vector.alphas[layer] if vector.operation == "add" else vector.strength
    if amount == 0.0:
        return ("nothing (strength 0)", "", "")
    point = point_of(vector.site, layer, layout.parallel)
    adds = vector.operation == "add"
    constant = adds or (vector.operation == "affine" and vector.targets.get(layer, 0.0) != 0.0)
    parts = []
    if point == ("embed", 0):
        parts.append("embedding shift" if adds else "rank-1 update of the embeddings")
    else:
        if not adds:
            parts.append("rank-1 update of the writers")
        if constant:
            if point not in routes and why:
                return (None, why, f"add at embed (resid_pre of layer 0), or {HOOK}")
            # What a later projection of the same writer takes out again needs no route.
            parts.append(routes.get(point, "nothing left to add"))
    return (" + ".join(parts), "", "")


def _costed(plan: Plan, draft: Draft, base: dict[str, TensorSource]) -> Plan:
    files, tensors = arrange(draft), draft.tensors()
    changed = sorted(name for name, source in tensors.items() if base.get(name) != source)
    written = [file for file in files if file.shared is None]
    extra = len(draft.blocks) - int(draft.base.config.num_hidden_layers)
    steered = tuple(n for n in changed if not isinstance(tensors[n], Zeros))
    return replace(
        plan,
        extra_layers=extra,
        changed=tuple(changed),
        bytes_written=sum(file.nbytes for file in written),
        bytes_shared=sum(file.nbytes for file in files if file.shared is not None),
        files_written=len(written),
        files=len(files),
        steered=steered,
        new_tensors=not any(name in base for name in changed),
        steps=tuple(draft.steps),
        notes=(draft.layout.notes if extra else ()) + _serving(draft.layout, steered),
    )


def _serving(layout: Layout, steered: Sequence[str]) -> tuple[str, ...]:
    """What a server would need to be told."""
    dropped = layout.mid_bias if layout.model_type in _NO_OUTPUT_BIAS else None
    if dropped is None or not any(name.endswith(dropped) for name in steered):
        return ()
    return (_SERVE.format(dropped),)


def _span(layers: Sequence[int]) -> str:
    """Write ascending layers as 0-3, 7."""
    # Along a run, a layer and its place grow alike.
    runs = groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    parts = [[layer for _, layer in run] for _, run in runs]
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
