"""Feeding a batch what kept keys and values do not hold of its rows.

Every batch feeds the same number of last columns of its rows; what stands before them comes from
kept keys and values, and rows that lack fewer feed some tokens again instead of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trimtab.models.batch import padded
from trimtab.models.chat import Encoded
from trimtab.models.generation import pad_id
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.replay import KeptCache
from trimtab.passes.sharing import call
from trimtab.prompts.scoring.keys import Keys
from trimtab.prompts.scoring.room import out_of_memory

_FURTHER_ON = 1 << 30
# What a model says that wants another cache.
_REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Feeder:
    """Makes the calls of one model, and counts them."""

    def __init__(self, lm: LanguageModel, count: Callable[[int], None]) -> None:
        """`count` is called with the token positions of every call."""
        self.lm = lm
        self._count = count

    def logits(
        self, items: Sequence[Encoded], keys: Keys | None, sequences: Sequence[int], keep: int
    ) -> Tensor:
        """The float32 logits of the last `keep` positions."""
        logits, _ = self._feed(items, keys, sequences, keep)
        assert logits is not None  # such a pass runs to the end
        return logits[:, -keep:].float()

    def keys(self, items: Sequence[Encoded], base: Keys | None, sequences: Sequence[int]) -> Keys:
        """Everybody's keys."""
        _, cache = self._feed(items, base, sequences, 0)
        return Keys.of(cache, [len(item.ids) for item in items])

    def _feed(
        self, items: Sequence[Encoded], keys: Keys | None, sequences: Sequence[int], keep: int
    ) -> tuple[Tensor | None, KeptCache]:
        """Feed what kept keys do not hold; without logits to keep, the last block does not run."""
        lengths = [len(item.ids) for item in items]
        held = [keys.lengths[s] if keys else 0 for s in sequences]
        # Every row feeds its last `fed` tokens: rows that lack fewer feed some again.
        fed = max(keep, 1, *(n - h for n, h in zip(lengths, held, strict=True)))
        ends = [max(0, n - fed) for n in lengths]
        width = max(ends) + fed
        pad = pad_id(self.lm.tokenizer)
        batch = padded(items, range(len(items)), width, pad).to(self.lm.device)
        ids = batch.input_ids[:, width - fed :]
        self.lm.check_length(width)
        self._count(ids.numel())
        with _whole_rows(self.lm):
            cache = KeptCache()
            if keep and not max(ends):
                return self.lm.forward(batch, keep), cache
            if keys is not None and max(ends):
                cache = keys.cache(sequences, ends, width)
            if not keep:
                # Nobody reads what the last block makes of its keys.
                cache.stop_after = self.lm.n_layers - 1
            return call(self.lm, batch, ids, batch.attention_mask, cache, max(1, keep)), cache

    def keys_hold(self, item: Encoded) -> bool:
        """Whether this model gives the same when it continues from kept keys: tried on one text."""
        arguments = self.lm.forward_arguments
        stateful = getattr(self.lm.model, "_is_stateful", False)
        if stateful or "past_key_values" not in arguments or len(item.ids) < 2:
            return False
        half = len(item.ids) // 2
        rest = len(item.ids) - half
        whole = self.logits([item], None, [0], rest)
        try:
            keys = self.keys([beginning(item.ids[:half])], None, [0])
            parts = self.logits([item], keys, [0], rest)
        except _REFUSALS as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            return False
        exact = self.lm.model.dtype in (torch.float32, torch.float64)
        apart = (whole - parts).abs().max() / whole.abs().max().clamp(min=1e-6)
        return bool(apart < (1e-3 if exact else 0.1))


@contextmanager
def _whole_rows(lm: LanguageModel) -> Iterator[None]:
    """Hand the unembedding its rows in one piece.

    Of a slice (what `logits_to_keep` makes) torch multiplies bfloat16 on a processor batch by
    batch, with a copy of the weights for each.
    """
    head = lm.model.get_output_embeddings()
    if head is None:
        yield
        return
    with Hooks() as hooks:
        hooks.before(head, Tensor.contiguous)
        yield


def beginning(ids: Sequence[int]) -> Encoded:
    """The first tokens of a prompt, whose end is further on than any of them."""
    return Encoded("", list(ids), _FURTHER_ON + 1, _FURTHER_ON)
