"""Steering an unmodified model with forward hooks, and undoing it exactly.

One hook on the module that owns the blocks works out, once per call, which tokens each scope
covers; the hooks on the layers only add. Nothing of the model is replaced, so removing the hooks
restores it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.probe import first_tensor, input_tensor
from trimtab.scope import Scope
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.model import Batch, LanguageModel

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
    if not active or (factors is not None and not bool(factors.any())):
        yield
        return
    coverage = _Coverage(lm, factors)
    with ExitStack() as stack:
        # Appended to the hooks that exist, so an outer context has changed the stream before an
        # inner one does.
        handle = lm.sites.trunk.register_forward_pre_hook(coverage.prepare, with_kwargs=True)
        stack.callback(handle.remove)
        for edit in active:
            _install(stack, lm, edit, coverage)
        yield


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


class _Coverage:
    """Which tokens of the current call each scope covers."""

    def __init__(self, lm: LanguageModel, factors: Tensor | None) -> None:
        self.lm = lm
        self.factors = factors
        self.batch: Batch | None = None
        self.rows = 0
        self.prompt_length: Tensor | None = None
        self.instruction_end: Tensor | None = None
        self.seen_ids: Tensor | None = None
        self.positions = torch.empty(0)
        self.real: Tensor | None = None
        self.row_factors: Tensor | None = None
        self.scopes: list[Scope] = []
        self.weights: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}

    def number(self, scope: Scope) -> int:
        """A scope's number, cheaper to look up at every layer than the scope itself."""
        if scope not in self.scopes:
            self.scopes.append(scope)
        return self.scopes.index(scope)

    def prepare(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each call of the model: positions, boundaries, and an empty table of masks."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs["inputs_embeds"]
        rows, length = ids.shape[:2]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        position_ids = kwargs.get("position_ids")
        batch = self.lm.active_batch
        plain = isinstance(mask, Tensor) and mask.ndim == 2
        cache = kwargs.get("past_key_values")
        # Asked only where needed: this runs at every step of a generation.
        past = 0
        if cache is not None and (batch is None or not plain):
            past = int(cache.get_seq_length())
        self.positions, self.real = _locate(mask, position_ids, rows, length, past, ids.device)
        self.weights.clear()
        if batch is None:
            self._guess_boundaries(ids, past)
        elif batch is not self.batch or rows != self.rows:
            self.prompt_length = _expand(batch.prompt_length.to(ids.device), rows)
            self.instruction_end = _expand(batch.instruction_end.to(ids.device), rows)
        if self.factors is not None and (batch is not self.batch or rows != self.rows):
            self.row_factors = _of_rows(self.factors, batch, rows).to(ids.device)[:, None, None]
        # Last, so that a refused call is refused again.
        self.batch, self.rows = batch, rows

    def _guess_boundaries(self, ids: Tensor, past: int) -> None:
        """Without a batch, the first call with an empty cache is the prompt."""
        self.instruction_end = None
        if past:
            if self.prompt_length is not None and self.prompt_length.shape[0] != ids.shape[0]:
                self.prompt_length = None
            return
        seen, self.seen_ids = self.seen_ids, ids
        if (
            seen is not None
            and ids.ndim == 2
            and ids.shape == (seen.shape[0], seen.shape[1] + 1)
            and torch.equal(ids[:, :-1], seen)
        ):
            # The same text with one token more: generation without a cache goes on.
            return
        self.prompt_length = self.positions[:, -1] + 1

    def weight(self, number: int, hidden: Tensor) -> Tensor | None:
        """1 or the row's factor where a token is steered, else 0, `[batch, seq, 1]`; None is 1."""
        # Row factors multiply in float32, so that a row equals the same row steered alone at that
        # strength.
        dtype = hidden.dtype if self.row_factors is None else torch.float32
        key = (number, dtype, hidden.device)
        if key not in self.weights:
            covered = self._covered(self.scopes[number])
            self.weights[key] = None if covered is None else covered.to(hidden.device, dtype)
        return self.weights[key]

    def _covered(self, scope: Scope) -> Tensor | None:
        if scope.name == "all" and self.real is None:
            return self.row_factors
        real = self.real
        if real is None:
            real = torch.ones_like(self.positions, dtype=torch.bool)
        mask = scope.mask(self.positions, real, self.prompt_length, self.instruction_end)
        mask = mask.unsqueeze(-1)
        return mask if self.row_factors is None else mask * self.row_factors


def _locate(
    mask: object,
    position_ids: Tensor | None,
    rows: int,
    length: int,
    past: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Absolute positions of a call's tokens, and which are no padding (None: all are real)."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if length == 1:
            return mask.sum(1, keepdim=True) - 1, mask[:, -1:] != 0
        return (mask.cumsum(1) - 1)[:, -length:], mask[:, -length:] != 0
    if position_ids is None:
        return torch.arange(past, past + length, device=device).expand(rows, length), None
    positions = position_ids.expand(rows, length)
    if mask is None:
        return positions, None
    # A prepared 4-D mask hides the padding, but the position ids still show it: they count up to
    # the last token, and before the first one they stand still.
    expected = positions[:, -1:] - torch.arange(length - 1, -1, -1, device=positions.device)
    return positions, (positions == expected) & (expected >= 0)


def _expand(values: Tensor, rows: int) -> Tensor:
    """Per-prompt values where a call holds each prompt several times in a row (beams, samples)."""
    if values.shape[0] == rows:
        return values
    if rows % values.shape[0]:
        raise TrimtabError(
            f"a call with {rows} rows",
            f"a batch of {values.shape[0]} prompts",
            "call the model with the batch's rows",
        )
    return values.repeat_interleave(rows // values.shape[0])


def _of_rows(factors: Tensor, batch: Batch | None, rows: int) -> Tensor:
    """Each row's factor, float32 `[rows]`."""
    if batch is None:
        if len(factors) == rows:
            return factors
        found = f"a call with {rows} rows"
    else:
        index = batch.rows.to(factors.device)
        if int(index.max()) < len(factors):
            return _expand(factors[index], rows)
        found = f"at least {int(index.max()) + 1} prompts"
    raise TrimtabError(f"{len(factors)} row factors", found, "give one factor per prompt")


def _install(stack: ExitStack, lm: LanguageModel, edit: Edit, coverage: _Coverage) -> None:
    """Put one edit's hook in place."""
    tap = lm.sites.writing(edit.site)
    if edit.site.kind == "resid_mid" and edit.operation != "add":
        # The middle of a block exists only as a sum: remember the half that the attention does not
        # write.
        entries: list[Tensor] = []

        def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = input_tensor(args, kwargs)
            assert hidden is not None  # the probe saw hidden states here
            entries[:] = [hidden]

        block = lm.sites.blocks[edit.site.layer]
        stack.callback(block.register_forward_pre_hook(remember, with_kwargs=True).remove)
        stack.callback(entries.clear)
        change = _change(edit, tap.scale, coverage, entries)
    else:
        change = _change(edit, tap.scale, coverage, None)
    if tap.on_input:
        stack.callback(
            tap.module.register_forward_pre_hook(_on_input(change), with_kwargs=True).remove
        )
    else:
        stack.callback(tap.module.register_forward_hook(_on_output(change)).remove)


def _change(
    edit: Edit, scale: float, coverage: _Coverage, entries: list[Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """The function of the hidden states `[batch, seq, d_model]` that one edit is.

    The module's output times `scale` is the site's value, so a change of the site is divided by it.
    """
    if edit.operation == "add":
        return _addition(edit, scale, coverage)
    return _projection(edit, scale, coverage, entries)


def _addition(edit: Edit, scale: float, coverage: _Coverage) -> Callable[[Tensor], Tensor]:
    scope = coverage.number(edit.scope)
    step = _Vector(edit, edit.amount / scale)

    def add(hidden: Tensor) -> Tensor:
        weight = coverage.weight(scope, hidden)
        if weight is None:
            return hidden + step.like(hidden)
        if weight.dtype == hidden.dtype:
            return torch.addcmul(hidden, weight, step.like(hidden))
        return hidden + (weight * step.to(torch.float32, hidden.device)).to(hidden.dtype)

    return add


def _projection(
    edit: Edit, scale: float, coverage: _Coverage, entries: list[Tensor] | None
) -> Callable[[Tensor], Tensor]:
    scope = coverage.number(edit.scope)
    # (h.c) of the site's value, and the step back along c: products in float32 in any dtype of the
    # stream.
    reader, step = _Vector(edit, scale), _Vector(edit, -edit.amount / scale)
    plain = _Vector(edit, 1.0)
    target = edit.target if edit.operation == "affine" else 0.0

    def project(hidden: Tensor) -> Tensor:
        device = hidden.device
        value = hidden if hidden.dtype == torch.float32 else hidden.float()
        excess = (value @ reader.to(torch.float32, device)).unsqueeze(-1)
        if entries is not None:
            entry = entries[0].to(device, torch.float32)
            excess = excess + (entry @ plain.to(torch.float32, device)).unsqueeze(-1)
        if target:
            excess = excess - target
        weight = coverage.weight(scope, hidden)
        if weight is not None:
            excess = excess * weight
        if value is hidden:
            return torch.addcmul(hidden, excess, step.to(torch.float32, device))
        return hidden + (excess * step.to(torch.float32, device)).to(hidden.dtype)

    return project


class _Vector:
    """A multiple of an edit's direction, moved once to each device and dtype of the stream."""

    def __init__(self, edit: Edit, factor: float) -> None:
        self.edit = edit
        self.value = edit.direction.float() * factor
        self.moved: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, hidden: Tensor) -> Tensor:
        return self.to(hidden.dtype, hidden.device)

    def to(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (dtype, device)
        found = self.moved.get(key)
        if found is None:
            found = self.moved[key] = self.value.to(device, dtype)
            # An infinity would reach every token, the masked ones as well: 0 * inf is NaN.
            if not bool(found.isfinite().all()):
                raise TrimtabError(
                    f"{self.edit.operation} {self.edit.amount:g} at {self.edit.site}",
                    f"more than {dtype} holds",
                    "lower the strength, or load the model in bfloat16",
                )
        return found


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def hook(module: nn.Module, args: tuple, output: object) -> object:
        # Blocks return a tensor in transformers 5 and a tuple before it; attention modules return a
        # tuple.
        if isinstance(output, Tensor):
            return change(output)
        hidden = first_tensor(output)
        assert hidden is not None and isinstance(output, (tuple, list))
        return (change(hidden), *output[1:])

    return hook


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook
