"""What a few prompts have in common at all strengths of a vector, and the rest of their passes.

Rows of a call are strengths times prompts, strength by strength, padded on the left: they end in
the same column. Every call is made inside `lm.calling`, with the hooks of `vector.on`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel, feed
from trimtab.models.replay import KeptCache, KeptLayer, Recording, Stopped, recorded, replayed
from trimtab.steering.vector import VectorSteering


def shared_depth(vector: VectorSteering) -> int:
    """The last block that gives the same at every strength, before hooks on it; -1 for none."""
    lowest = min(vector.layers)
    return lowest if vector.site == "resid_post" else lowest - 1


def call(
    lm: LanguageModel, batch: Batch, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int
) -> Tensor | None:
    """Feed tokens after a cache, see `feed`; None where the cache has ended the pass."""
    try:
        return feed(lm, batch, ids, mask, cache, keep).float()
    except Stopped:
        return None


@dataclass(eq=False)
class Shared:
    """A group of prompts; `run` reads them unsteered, then `steer` at strengths.

    Attributes:
        lm: The model.
        vector: What is scaled.
        batch: The prompts, the longest first.
        keep: Columns at the end that are read.
        depth: The last block that is shared.
        call_tokens: Tokens that take as long as a call by itself.
        width: Columns.
        start: Column of the first steered token; `width` if there is none.
        common: Tokens that all prompts begin with, and that are steered alike.
        logits: Unsteered logits `[prompts, keep, vocab]`, where `run` had to make them.
    """

    lm: LanguageModel
    vector: VectorSteering
    batch: Batch
    keep: int
    call_tokens: int
    depth: int = field(init=False)
    width: int = field(init=False)
    start: int = field(init=False)
    common: int = field(init=False)
    logits: Tensor | None = field(init=False, default=None)
    _block: Recording = field(init=False)
    _cache: KeptCache = field(init=False)

    def __post_init__(self) -> None:
        """Find what is shared; nothing is run yet."""
        self.depth = shared_depth(self.vector)
        self.width = self.batch.input_ids.shape[1]
        start, common = _bounds(self.vector, self.batch)
        # Columns that are read belong to each row.
        self.common = min(common, self.width - self.keep)
        self.start = start if start == self.width else min(start, self.width - self.keep)

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        vector: VectorSteering,
        encoded: Sequence[Encoded],
        keep: int,
        call_tokens: int,
    ) -> Shared:
        """Put prompts in one batch; `batch.rows` says where each one stood."""
        longest = max(len(item.ids) for item in encoded)
        (batch,) = lm.batches(encoded, longest * len(encoded), len(encoded))
        return cls(lm, vector, batch, keep, call_tokens)

    @property
    def _last(self) -> int:
        return len(self.lm.sites.blocks) - 1

    @property
    def _above(self) -> range:
        """The blocks that strengths change."""
        return range(self.depth + 1, self._last + 1)

    def run(self, unsteered: bool = False) -> None:
        """Read the prompts without the vector, as far as strengths need it.

        Args:
            unsteered: To the end, for `logits`.
        """
        to_end = unsteered or self.start == self.width
        needs_keys = bool(self.start and self._above)
        self._block = Recording(stop=not to_end and not needs_keys)
        # Where no output is read, the pass can stop as soon as the last block has its keys.
        self._cache = KeptCache(stop_after=self._last if needs_keys and not to_end else None)
        if not to_end and not needs_keys and self.depth < 0:
            return
        with ExitStack() as stack:
            if self.depth >= 0:
                stack.enter_context(recorded(self.lm.sites.blocks[self.depth], self._block))
            ids, mask = self.batch.input_ids, self.batch.attention_mask
            self.logits = call(self.lm, self.batch, ids, mask, self._cache, self.keep)

    def steer(self, strengths: Sequence[float], whole: bool = False) -> tuple[Tensor, KeptCache]:
        """Read the prompts at strengths.

        Args:
            strengths: Multipliers m.
            whole: Give a cache that holds every layer and column and can be continued.

        Returns:
            float32 logits `[strengths * prompts, keep, vocab]`, and the cache.
        """
        many, rows = len(strengths), len(self.batch.rows)
        if self.start == self.width:
            assert self.logits is not None  # `run` went to the end
            read = range(self._last + 1) if whole else ()
            cache = KeptCache([self._spread(i, many, self.width) for i in read])
            return self.logits.repeat(many, 1, 1), cache
        batch, tail = spread(self.batch, many), self.width - self.keep
        with self.vector.on(self.lm, [m for m in strengths for _ in range(rows)]):
            begin, cache = self._begin(many)
            saved = many * rows * (tail - begin)
            if not self._above:
                # No block is left that would read keys.
                begin = tail
            elif saved > self.call_tokens * len(self._above):
                # Of the last block, columns that are not read need their keys only.
                cache.stop_after = self._last
                self._feed(batch, cache, begin, tail, rows)
                cache.stop_after, begin = None, tail
            logits = self._feed(batch, cache, begin, self.width, rows)
        assert logits is not None
        if whole:
            cache.layers[: self.depth + 1] = [
                self._spread(i, many, self.width) for i in range(self.depth + 1)
            ]
        return logits, cache

    def _begin(self, many: int) -> tuple[int, KeptCache]:
        """How many first columns need not be fed, and a cache that holds them above the depth."""
        rows, start, common = len(self.batch.rows), self.start, self.common
        saved = many * (rows - 1) * (common - start)
        if saved <= self.call_tokens or not self._above:
            return start, self._cache_of([self._spread(i, many, start) for i in self._above])
        # The longest prompt stands first and has no padding: its columns are positions.
        first = Batch(
            **{f.name: getattr(self.batch, f.name)[:1].repeat_interleave(many, 0) for f in _PARTS},
            rows=torch.arange(many, device=self.batch.rows.device) * rows,
        )
        cache = self._cache_of([self._spread(i, many, start, 1) for i in self._above])
        cache.stop_after = self._last
        self._feed(first, cache, start, common, 1)
        pad = self.width - self.batch.attention_mask.sum(1, keepdim=True)
        places = (torch.arange(common, device=pad.device) - pad).clamp(min=0)
        layers = []
        for i in self._above:
            # [strengths, heads, prompts, columns, width]; what stands in padding is masked.
            moved = [x[:, :, places.to(x.device)].transpose(1, 2) for x in cache.pair(i)]
            layers.append(KeptLayer.of(moved[0], moved[1], self.width))
        return common, self._cache_of(layers)

    def _cache_of(self, above: list[KeptLayer]) -> KeptCache:
        return KeptCache([KeptLayer() for _ in range(self.depth + 1)] + above)

    def _spread(self, layer: int, many: int, length: int, prompts: int | None = None) -> KeptLayer:
        """The first columns' unsteered keys and values, for every strength."""
        if length == 0:
            return KeptLayer(self.width)
        keys, values = (x[:prompts, :, :length] for x in self._cache.pair(layer))
        return KeptLayer.of(
            keys.expand(many, *keys.shape), values.expand(many, *values.shape), self.width
        )

    def _feed(
        self, batch: Batch, cache: KeptCache, start: int, stop: int, prompts: int
    ) -> Tensor | None:
        """Feed columns at many strengths; `prompts` says how many of the group are in the batch."""
        keep = max(1, stop - (self.width - self.keep))
        with ExitStack() as stack:
            if self.depth >= 0:
                length = KeptLayer.placeholder(len(batch.rows), start)
                cache.layers[: self.depth + 1] = [length] * (self.depth + 1)
                hidden = self._block.hidden[:prompts, start:stop]
                hidden = hidden.repeat(len(batch.rows) // prompts, 1, 1)
                blocks = list(self.lm.sites.blocks)
                stack.enter_context(replayed(blocks, self.depth, self._block, hidden))
            ids, mask = batch.input_ids[:, start:stop], batch.attention_mask[:, :stop]
            return call(self.lm, batch, ids, mask, cache, keep)


_PARTS = [part for part in fields(Batch) if part.name != "rows"]


def spread(batch: Batch, many: int) -> Batch:
    """The same prompts `many` times over; rows are numbered again."""
    parts = {f.name: torch.cat([getattr(batch, f.name)] * many) for f in _PARTS}
    rows = torch.arange(many * len(batch.rows), device=batch.rows.device)
    return Batch(**parts, rows=rows)


def first_steered(vector: VectorSteering, encoded: Encoded) -> int:
    """Position of the first steered token; the number of tokens if there is none.

    Raises:
        TrimtabError: As the hooks do: a scope whose span is empty.
    """
    length = len(encoded.ids)
    covered = vector.scope.mask(
        torch.arange(length)[None],
        torch.ones(1, length, dtype=torch.bool),
        torch.tensor([encoded.prompt_length]),
        torch.tensor([encoded.instruction_end]),
    )[0]
    return int(covered.nonzero()[0]) if bool(covered.any()) else length


def _bounds(vector: VectorSteering, batch: Batch) -> tuple[int, int]:
    """The first steered column, and how many first tokens all rows have and steer alike."""
    real = batch.attention_mask.bool().cpu()
    width = real.shape[1]
    positions = real.long().cumsum(1) - 1
    ends = batch.prompt_length.cpu(), batch.instruction_end.cpu()
    covered = vector.scope.mask(positions, real, *ends)
    columns = covered.any(0).nonzero()
    start = int(columns[0]) if len(columns) else width
    lengths = real.sum(1)
    index = (torch.arange(width) + (width - lengths)[:, None]).clamp(max=width - 1)
    ids, covered = batch.input_ids.cpu().gather(1, index), covered.gather(1, index)
    alike = ((ids == ids[0]) & (covered == covered[0])).all(0)
    alike &= torch.arange(width) < int(lengths.min())
    return start, int(alike.long().cumprod(0).sum())
