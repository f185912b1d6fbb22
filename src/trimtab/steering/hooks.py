"""Steering an unmodified model with forward hooks, and undoing it exactly.

One hook on the module that owns the blocks works out, once per call, which tokens each scope
covers; the hooks on the layers only add. Nothing of the model is replaced, so removing the hooks
restores it bit for bit.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from trimtab.errors import TrimtabError
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.opened import names
from trimtab.models.sites import Site
from trimtab.steering.coverage import Coverage, Place
from trimtab.steering.scope import Scope

OPERATIONS = ("add", "ablate", "affine")


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of the hidden state h at a site, along a unit direction c.

    `add`: h + amount * c. `ablate`: h - amount * (h.c) c. `affine`: h - amount * ((h.c) - target)
        c.

    Attributes:
        site: Where.
        operation: "add", "ablate" or "affine".
        direction: Unit vector `[d_model]`.
        amount: Raw alpha in the units of the stream for `add`, a share (1 is all of it) for the
            others.
        target: The projection that `affine` moves to.
        scope: Which token positions.
    """

    site: Site
    operation: str
    direction: Tensor
    amount: float
    target: float = 0.0
    scope: Scope = Scope("all")


@contextmanager
def steered(
    lm: LanguageModel, edits: Sequence[Edit], row_factors: Tensor | Sequence[float] | None = None
) -> Iterator[None]:
    """Apply edits to every call of the model made inside.

    Inside `lm.calling(batch)` (as in `lm.generate` and `lm.forward`) the prompt boundaries come
    from the batch. A direct call of the model with an empty cache is taken for a whole prompt, and
    what follows it for generated tokens; a prompt that is fed in chunks needs `lm.calling`.

    Args:
        lm: The model.
        edits: Applied in order; contexts may be nested, and then their edits add up.
        row_factors: `[prompts]`; the amount of row i of the caller's prompts is `amount *
            row_factors[i]`.

    Raises:
        TrimtabError: An edit does not fit the model, or a scope needs a boundary that a call does
            not have.
    """
    for edit in edits:
        _check(lm, edit)
    factors = None if row_factors is None else torch.as_tensor(row_factors, dtype=torch.float32)
    if factors is not None and (factors.ndim != 1 or not bool(factors.isfinite().all())):
        raise TrimtabError(
            "row factors", f"shape {tuple(factors.shape)}", "give one finite number per prompt"
        )
    # An amount of zero installs nothing: the identity bit for bit.
    active = [edit for edit in edits if edit.amount != 0]
    if not active or (factors is not None and _all_zero(factors)):
        yield
        return
    coverage = Coverage(lm, factors)
    # Appended to the hooks that exist, so an outer context has changed the stream before an inner
    # one does.
    with Hooks(elsewhere=_Bystander(lm)) as hooks:
        hooks.calls(lm.sites.trunk, before=coverage.prepare)
        for edit in active:
            _install(hooks, lm, edit, coverage)
        yield


class _Bystander:
    """Warns once of calls in a thread that was started inside the block and inherits nothing."""

    def __init__(self, lm: LanguageModel) -> None:
        self.name, self.warned = lm.name, False
        self.older = WeakSet(threading.enumerate())

    def __call__(self) -> None:
        thread = threading.current_thread()
        if self.warned or thread in self.older or names() - {"active_batch"}:
            return
        self.warned = True
        warnings.warn(
            f"{self.name} is called in the thread {thread.name!r}, which was started while a "
            "steering of another thread was open and is not steered by it. Enter `on` inside the "
            "thread, or start it with contextvars.copy_context().run.",
            RuntimeWarning,
            stacklevel=2,
        )


def _all_zero(factors: Tensor) -> bool:
    """Whether nothing is steered; zeros that carry a derivative are a place to differentiate at."""
    differentiated = factors.requires_grad or unpack_dual(factors).tangent is not None
    return not differentiated and not bool(factors.any())


def _check(lm: LanguageModel, edit: Edit) -> None:
    lm.sites.check(edit.site)
    asked = f"{edit.operation} at {edit.site}"
    if edit.operation not in OPERATIONS:
        raise TrimtabError(asked, "no such operation", f"use one of {', '.join(OPERATIONS)}")
    if tuple(edit.direction.shape) != (lm.d_model,):
        raise TrimtabError(
            asked,
            f"a direction of shape {tuple(edit.direction.shape)} for a model of width {lm.d_model}",
            "use a direction that was made for this model",
        )
    numbers = torch.tensor([edit.amount, edit.target])
    if not bool(edit.direction.isfinite().all() & numbers.isfinite().all()):
        raise TrimtabError(
            asked, "numbers that are not finite", "find the direction or choose the strength again"
        )


def _install(hooks: Hooks, lm: LanguageModel, edit: Edit, coverage: Coverage) -> None:
    """Put one edit's hook in place."""
    tap = lm.sites.writing(edit.site)
    if edit.operation == "add":
        hooks.at(tap, _addition(edit, tap.scale, coverage))
        return
    entry: threading.local | None = None
    if edit.site.kind == "resid_mid":
        # The middle of a block exists only as a sum: remember the half that the attention does not
        # write, for the thread that the call is made in.
        entry = threading.local()
        hooks.before(lm.sites.blocks[edit.site.layer], partial(setattr, entry, "hidden"))
    hooks.at(tap, _projection(edit, tap.scale, coverage, entry))


# The functions below take the hidden states `[batch, seq, d_model]` that a module returns; `scale`
# times those is the site's value, so a change of the site is divided by it.


def _addition(edit: Edit, scale: float, coverage: Coverage) -> Callable[[Tensor], Tensor]:
    slot = coverage.slot(edit.scope)
    step = edit.direction.float() * (edit.amount / scale)
    moved: dict[Place, Tensor] = {}

    # At every layer of every step of a generation: a few look-ups and one operation.
    def add(hidden: Tensor) -> Tensor:
        place = (hidden.dtype, hidden.device)
        vector = moved.get(place)
        if vector is None:
            vector = _move(moved, place, step, edit)
        return torch.addcmul(hidden, coverage.weight(slot, place), vector)

    def add_by_row(hidden: Tensor) -> Tensor:
        place = (torch.float32, hidden.device)
        vector = _move(moved, place, step, edit)
        return hidden + (coverage.weight(slot, place) * vector).to(hidden.dtype)

    return add if coverage.factors is None else add_by_row


def _projection(
    edit: Edit, scale: float, coverage: Coverage, entry: threading.local | None
) -> Callable[[Tensor], Tensor]:
    slot = coverage.slot(edit.scope)
    # The site's (h.c) as a product with a column, and the step back along c.
    direction = edit.direction.float()
    column, step = (direction * scale).unsqueeze(-1), direction * (-edit.amount / scale)
    columns: dict[Place, Tensor] = {}
    steps: dict[Place, Tensor] = {}
    target = edit.target if edit.operation == "affine" else 0.0

    # In float32 whatever the dtype of the stream.
    def project(hidden: Tensor) -> Tensor:
        place = (torch.float32, hidden.device)
        value = hidden if hidden.dtype == torch.float32 else hidden.float()
        excess = value @ _move(columns, place, column, edit)
        if entry is not None:
            # The column of the stream itself, which no multiplier divides.
            excess = excess + entry.hidden.to(hidden.device, torch.float32) @ columns[place] / scale
        if target:
            excess = excess - target
        excess = excess * coverage.weight(slot, place)
        vector = _move(steps, place, step, edit)
        if value is hidden:
            return torch.addcmul(hidden, excess, vector)
        return hidden + (excess * vector).to(hidden.dtype)

    return project


def _move(moved: dict[Place, Tensor], place: Place, value: Tensor, edit: Edit) -> Tensor:
    """A value in the dtype and on the device of the stream, moved there once."""
    found = moved.get(place)
    if found is None:
        dtype, device = place
        found = moved[place] = value.to(device, dtype)
        # An infinity would reach every token, the masked ones as well: 0 * inf is NaN.
        if not bool(found.isfinite().all()):
            raise TrimtabError(
                f"{edit.operation} {edit.amount:g} at {edit.site}",
                f"more than {dtype} holds",
                "lower the strength, or load the model in bfloat16",
            )
    return found
