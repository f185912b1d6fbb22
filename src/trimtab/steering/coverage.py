"""Which tokens of a call each scope covers, worked out once per call of the model."""

from __future__ import annotations

import asyncio
import threading
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.batch import Batch
from trimtab.models.model import LanguageModel
from trimtab.steering.scope import Scope

Place: TypeAlias = "tuple[torch.dtype, torch.device]"

# Scopes that cover every token of an answer, and those that cover none.
_ANSWERED = ("all", "last", "generated")
_UNANSWERED = ("prompt", "post_instruction")


class Coverage:
    """Which tokens of the current call each scope covers, for every thread and task by itself."""

    def __init__(self, lm: LanguageModel, factors: Tensor | None) -> None:
        """Know nothing yet: `prepare` is to see the calls of the module that owns the blocks."""
        self.lm = lm
        self.factors = factors
        self.scopes: list[Scope] = []
        # What continues from call to call belongs to a task; within a call there is only its thread.
        self._runs: WeakKeyDictionary[object, _CoverageRun] = WeakKeyDictionary()
        self._here = threading.local()

    def slot(self, scope: Scope) -> int:
        """The number by which `weight` knows a scope."""
        if scope not in self.scopes:
            self.scopes.append(scope)
        return self.scopes.index(scope)

    def weight(self, slot: int, place: Place) -> Tensor:
        """1 (or its row's factor) for a token that is steered, else 0: `[batch, seq, 1]`.

        Shapes may be 1 where nothing varies. With row factors ask for float32: the product with a
        direction is rounded once, so that a row equals the row steered alone at its strength.

        Args:
            slot: Of the scope.
            place: Dtype and device wanted.
        """
        run: _CoverageRun = self._here.run
        weight = run.weights.get((slot, place))
        if weight is None:
            weight = run.weights[slot, place] = run.weight(self.scopes[slot], place)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the current call's tokens are."""
        return self._here.run.positions.device

    def prepare(self, args: tuple, kwargs: dict) -> None:
        """Before each call of the model: positions, boundaries, and no weights yet."""
        key = _running()
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _CoverageRun(self.factors)
        self._here.run = run
        run.prepare(self.lm.active_batch, args, kwargs)


def _running() -> object:
    """The asyncio task that runs, or the thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop runs here
        return threading.current_thread()


class _CoverageRun:
    """The calls of one thread or task."""

    def __init__(self, factors: Tensor | None) -> None:
        self.factors = factors
        self.weights: dict[tuple[int, Place], Tensor] = {}
        self.batch: Batch | None = None
        self.rows = 0
        self.prompt_length: Tensor | None = None
        self.instruction_end: Tensor | None = None
        self.row_factors: Tensor | None = None
        self.seen_ids: Tensor | None = None
        self.positions = torch.empty(0)
        self.real: Tensor | None = None
        # Columns fed so far, once all rows are past their prompts; and the mask of a call that
        # feeds the next token of such rows.
        self.complete: int | None = None
        self.next_mask: Tensor | None = None

    def weight(self, scope: Scope, place: Place) -> Tensor:
        """See `Coverage.weight`."""
        dtype, device = place
        covered = self._covered(scope)
        if self.row_factors is not None:
            covered = covered * self.row_factors
        return covered.to(device, dtype)

    def _covered(self, scope: Scope) -> Tensor:
        mask = self.next_mask
        if mask is not None:
            if scope.name in _ANSWERED:
                return mask[:, -1:, None]
            if scope.name in _UNANSWERED:
                return torch.zeros(1, 1, 1)
            self.positions, self.real = _locate(mask, None, self.rows, 1, 0, mask.device)
        real = self.real
        if real is None:
            if scope.name == "all":
                return torch.ones(1, 1, 1, device=self.positions.device)
            real = torch.ones_like(self.positions, dtype=torch.bool)
        covered = scope.mask(self.positions, real, self.prompt_length, self.instruction_end)
        return covered.unsqueeze(-1)

    def prepare(self, batch: Batch | None, args: tuple, kwargs: dict) -> None:
        """See `Coverage.prepare`; `batch` is the one whose calls are being made."""
        self.weights.clear()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs["inputs_embeds"]
        rows, length = ids.shape[:2]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        known = batch is self.batch and rows == self.rows
        width = 0 if plain is None else plain.shape[1]
        if plain is not None and length == 1 and known and self.complete == width - 1:
            # A step of a generation, where time counts: the last column of the mask says it all.
            self.complete, self.next_mask = width, plain
            return
        self.complete, self.next_mask = None, None
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        position_ids = kwargs.get("position_ids")
        self.positions, self.real = _locate(mask, position_ids, rows, length, past, ids.device)
        if batch is None:
            self._guess_boundaries(ids, past)
        elif not known:
            self.prompt_length = _expand(batch.prompt_length.to(ids.device), rows)
            self.instruction_end = _expand(batch.instruction_end.to(ids.device), rows)
        if self.factors is not None and not known:
            self.row_factors = _of_rows(self.factors, batch, rows).to(ids.device)[:, None, None]
        # Set last: a call refused above is then refused again when it is repeated.
        self.batch, self.rows = batch, rows
        if plain is not None and self.prompt_length is not None:
            if bool(torch.all(self.positions[:, -1] + 1 >= self.prompt_length)):
                self.complete = width

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
            # The same text with one token more: generation without a cache continues.
            return
        self.prompt_length = self.positions[:, -1] + 1


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
