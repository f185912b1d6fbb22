"""KV caches of shared prefixes; a batch can resume from any of them, cut at any length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.models.replay import KeptCache, KeptLayer


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values of some token sequences, which end in the same column.

    Padding is on the left only: the distance of two columns is that of the tokens' positions, as
    sliding windows take it to be.

    Attributes:
        pairs: Keys and values of each layer, both `[sequences, heads, columns, width]`.
        lengths: Tokens of each sequence.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cache: KeptCache, lengths: Sequence[int]) -> Keys:
        """What a cache holds after sequences of these lengths."""
        pairs = tuple(cache.pair(layer) for layer in range(len(cache.layers)))
        return cls(pairs, tuple(lengths))

    @classmethod
    def stack(cls, many: Sequence[Keys]) -> Keys:
        """All sequences in one."""
        if len(many) == 1:
            return many[0]
        width = max(max(keys.lengths) for keys in many)

        def joined(parts: Iterable[Tensor]) -> Tensor:
            return torch.cat([pad(x, (0, 0, width - x.shape[-2], 0)) for x in parts])

        layers = zip(*(keys.pairs for keys in many), strict=True)
        pairs = tuple((joined(k for k, _ in each), joined(v for _, v in each)) for each in layers)
        return cls(pairs, tuple(length for keys in many for length in keys.lengths))

    def without_last(self, tokens: int) -> Keys:
        """The same sequences without their last tokens."""
        if not tokens:
            return self
        pairs = tuple((k[..., :-tokens, :], v[..., :-tokens, :]) for k, v in self.pairs)
        return Keys(pairs, tuple(length - tokens for length in self.lengths))

    def cache(self, sequences: Sequence[int], ends: Sequence[int], room: int) -> KeptCache:
        """A cache for a batch whose row i has read the first `ends[i]` tokens of `sequences[i]`.

        Rows end in the same column; `room` is how many columns the batch will have in all.
        """
        width, total = max(ends), self.pairs[0][0].shape[-2]
        rows = torch.tensor(list(sequences))
        # The column after the last token taken, for each row.
        stops = torch.tensor(
            [total - self.lengths[s] + end for s, end in zip(sequences, ends, strict=True)]
        )
        stop = int(stops[0])
        alike = bool((stops == stop).all()) and stop >= width
        single = alike and bool((rows == rows[0]).all())
        columns = (stops[:, None] - width + torch.arange(width)).clamp(min=0)

        def taken(x: Tensor) -> Tensor:
            if single:
                first = int(rows[0])
                return x[first, :, stop - width : stop].expand(len(rows), -1, -1, -1)
            if alike:
                return x[rows.to(x.device), :, stop - width : stop]
            picked = x.transpose(1, 2)[rows.to(x.device)[:, None], columns.to(x.device)]
            return picked.transpose(1, 2)

        return KeptCache([KeptLayer.of(taken(k), taken(v), room) for k, v in self.pairs])
