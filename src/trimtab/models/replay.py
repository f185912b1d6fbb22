"""What a forward pass need not do again: blocks that give back what they gave, keys already made.

Only the `forward` of some blocks is replaced, for the length of a `with` and for the calls made in it;
masks, rotary embeddings, norms and caps stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trimtab.models.hooking import Hooks, first_tensor, input_tensor


class Stopped(Exception):
    """Ends a forward pass whose remaining modules nobody reads."""


@dataclass(eq=False)
class Recording:
    """What one block returned, before any hook on it.

    Attributes:
        stop: End the pass there.
        output: The block's output: a tensor `[rows, seq, d_model]`, or a tuple that starts with it.
    """

    stop: bool
    output: object = field(default=None)

    @property
    def hidden(self) -> Tensor:
        """The hidden states `[rows, seq, d_model]`."""
        hidden = first_tensor(self.output)
        assert hidden is not None  # the probe saw hidden states here
        return hidden

    def like(self, hidden: Tensor) -> object:
        """Other hidden states in the form in which the block returns its own."""
        if isinstance(self.output, Tensor):
            return hidden
        assert isinstance(self.output, (tuple, list))
        return (hidden, *self.output[1:])


@contextmanager
def recorded(block: nn.Module, recording: Recording) -> Iterator[None]:
    """Keep what a block returns in each pass made inside; the last one stays."""

    def keep(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        recording.output = forward(*args, **kwargs)
        if recording.stop:
            raise Stopped
        return recording.output

    with Hooks() as hooks:
        hooks.around(block, keep)
        yield


@contextmanager
def replayed(
    blocks: Sequence[nn.Module], depth: int, recording: Recording, hidden: Tensor
) -> Iterator[None]:
    """Let `hidden` `[rows, seq, d_model]` leave block `depth`; those below it do nothing.

    Hooks on the blocks still run, so what they do to block `depth` is done once, here.
    """

    def entered(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        stream = input_tensor(args, kwargs)
        assert stream is not None  # the probe saw hidden states here
        return recording.like(stream)

    with Hooks() as hooks:
        for block in blocks[:depth]:
            hooks.around(block, entered)
        hooks.around(blocks[depth], lambda *_, **__: recording.like(hidden))
        yield


class KeptLayer(DynamicLayer):
    """Keys and values of one layer `[rows, heads, seq, width]`, in memory with room to grow."""

    def __init__(self, room: int = 0) -> None:
        """Make a layer without keys.

        Args:
            room: Tokens to take memory for at first.
        """
        super().__init__()
        self._room = room
        self._space: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, room: int) -> KeptLayer:
        """Copy keys and values to memory for `room` tokens; views spread over rows are taken too.

        All dimensions before the last three are rows.
        """
        layer = cls(room)
        layer._take(keys, values, max(room, keys.shape[-2]))
        layer._write(0, keys, values)
        return layer

    @classmethod
    def placeholder(cls, rows: int, length: int) -> KeptLayer:
        """Make a layer that has nothing but a length: its block does not run, masks need it."""
        layer = cls()
        layer._hold(*[torch.zeros(1).expand(rows, 1, length, 1)] * 2)
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append; memory is taken again only when the room is used up."""
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self._space is None or total > self._space[0].shape[-2]:
            old = self._space
            self._take(key_states, value_states, max(total, self._room, 2 * length))
            if old is not None:
                self._write(0, old[0][..., :length, :], old[1][..., :length, :])
        self._write(length, key_states, value_states)
        return self.pair

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        assert self._space is not None
        length = self.get_seq_length()
        keys, values = (x[indices.to(x.device)] for x in self._space)
        self._space = keys, values
        self._hold(self._space[0][..., :length, :], self._space[1][..., :length, :])

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values.

        Raises:
            RuntimeError: The model keeps none here.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError("a layer without keys of its own")
        return self.keys, self.values

    def _take(self, keys: Tensor, values: Tensor, room: int) -> None:
        spaces = [x.new_empty((*x.shape[:-2], room, x.shape[-1])) for x in (keys, values)]
        self._space = spaces[0], spaces[1]

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        assert self._space is not None
        stop = start + keys.shape[-2]
        for space, x in zip(self._space, (keys, values), strict=True):
            space[..., start:stop, :] = x
        # A view: rows that were spread over several dimensions become one.
        self._space = self._space[0].flatten(0, -4), self._space[1].flatten(0, -4)
        self._hold(self._space[0][..., :stop, :], self._space[1][..., :stop, :])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class KeptCache(DynamicCache):
    """Keys and values of every token at every layer, also where a layer attends to a window only.

    Models build the mask of a sliding window from the cache's length, so keeping what lies outside
    it changes nothing, and lets the cache be cut, spread over rows, and put together again.

    Attributes:
        stop_after: End the pass once this layer has its keys; None to run on.
    """

    def __init__(self, layers: Sequence[KeptLayer] = (), stop_after: int | None = None) -> None:
        """Start with the first layers' keys; layers are added as the model gets to them."""
        super().__init__()
        self.layers = list(layers)
        self.stop_after = stop_after

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer."""
        while len(self.layers) <= layer_idx:
            self.layers.append(KeptLayer())
        result = self.layers[layer_idx].update(key_states, value_states)
        if layer_idx == self.stop_after:
            raise Stopped
        return result

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each `[rows, heads, seq, width]`."""
        found = self.layers[layer]
        assert isinstance(found, KeptLayer)  # it makes no others
        return found.pair
