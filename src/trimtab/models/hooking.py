"""Hooks on modules that act on the calls of whoever put them there, and on no others.

Torch's own hooks act on every call of a module, whichever thread or task makes it, and a compiled
graph that was traced without them runs on without them. `Hooks` puts both right: see its docstring.
Hidden states come as a tensor (transformers 5) or as the first of a tuple (before it, and attention
modules); functions given here see and return the tensor alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.models.opened import OpenEntry, enter, is_open, leave

_LOCK = threading.Lock()


def first_tensor(value: object) -> Tensor | None:
    """The hidden states of a module's output: the tensor itself, or the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def input_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states that a module is called with."""
    return first_tensor(args) if args else first_tensor(kwargs.get("hidden_states"))


@dataclass(frozen=True)
class Tap:
    """Where a site is reached: a module's input or output, times `scale`, is the site's value."""

    module: nn.Module
    on_input: bool
    scale: float = 1.0


class Hooks:
    """Hooks on modules for the length of a `with` block, in the order in which they are put there.

    They act on calls made inside the block by the thread or asyncio task that entered it, and by
    what it starts with a copy of its context (see `trimtab.models.opened`). Compiled modules run eagerly
    meanwhile, those of other threads too: a graph knows nothing of hooks.

    Raises:
        TrimtabError: On a hook's call, where a thread of autograd runs a block again for its backward
            pass (gradient checkpointing on an accelerator); on leaving the block in another context
            than it was entered in, if calls were made there that the hooks could not act on.
    """

    def __init__(self, elsewhere: Callable[[], None] | None = None) -> None:
        """Hook nothing yet.

        Args:
            elsewhere: Called when a hook leaves a call of another thread or task alone.
        """
        self._entry = OpenEntry(self, "hooks", None)
        self._undo: list[Callable[[], object]] = []
        self._elsewhere, self._missed = elsewhere, False

    def __enter__(self) -> Hooks:
        """Open the block."""
        _eager(+1)
        enter(self._entry)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove every hook."""
        while self._undo:
            self._undo.pop()()
        _eager(-1)
        if not leave(self._entry) and self._missed and kind is None:
            raise TrimtabError(
                "to steer or read a model inside a `with` block",
                "the block was entered in one thread or task and left in another, "
                "so calls between were not steered",
                "enter the block where the calls are made, around each of them",
            )

    def calls(
        self,
        module: nn.Module,
        before: Callable[[tuple, dict], tuple[tuple, dict] | None] | None = None,
        after: Callable[[tuple, dict, Any], Any] | None = None,
    ) -> None:
        """See a module's calls; what is returned replaces the arguments, or the output.

        While a hook is put in place or taken away, torch may call it without the keyword arguments
        in another thread, whose calls are not ours.
        """
        if before is not None:
            change = before

            def pre(_: nn.Module, args: tuple, *kwargs: dict) -> tuple[tuple, dict] | None:
                return change(args, *kwargs) if self._mine() else None

            handle = module.register_forward_pre_hook(pre, with_kwargs=True)
            self._undo.append(handle.remove)
        if after is not None:
            change_output = after

            def post(_: nn.Module, args: tuple, *more: Any) -> Any:
                return change_output(args, *more) if self._mine() else None

            handle = module.register_forward_hook(post, with_kwargs=True)
            self._undo.append(handle.remove)

    def before(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> None:
        """See the hidden states that a module is called with; a tensor returned replaces them."""

        def change(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hidden = input_tensor(args, kwargs)
            assert hidden is not None  # the probe saw hidden states here
            other = function(hidden)
            if other is None:
                return None
            if args:
                return (other, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": other}

        self.calls(module, before=change)

    def after(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> None:
        """See the hidden states that a module returns; a tensor returned replaces them."""

        def change(args: tuple, kwargs: dict, output: Any) -> Any:
            if isinstance(output, Tensor):
                return function(output)
            hidden = first_tensor(output)
            assert hidden is not None  # the probe saw hidden states here
            other = function(hidden)
            return None if other is None else (other, *output[1:])

        self.calls(module, after=change)

    def at(self, tap: Tap, function: Callable[[Tensor], Tensor | None]) -> None:
        """See what stands at a tap, the module's input or its output."""
        (self.before if tap.on_input else self.after)(tap.module, function)

    def around(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Replace a module's `forward`; hooks on the module still run.

        Args:
            module: Whose forward.
            function: Called with the forward that it replaces, and with the call's arguments.
        """
        with _LOCK:
            dispatch = module.__dict__.get("forward")
            if not isinstance(dispatch, _Dispatch):
                dispatch = module.__dict__["forward"] = _Dispatch(module)
            item = (self, function)
            dispatch.items = (*dispatch.items, item)
        self._undo.append(partial(dispatch.drop, item))

    def _mine(self) -> bool:
        """Whether the running call was made inside the block."""
        if is_open(self._entry):
            return True
        if torch._C._current_graph_task_id() != -1:
            raise TrimtabError(
                "gradient checkpointing of a steered model",
                "a block is run again by a thread of autograd, which knows nothing of the steering",
                "turn checkpointing off, or call backward in the thread and block of the forward pass",
            )
        self._missed = True
        if self._elsewhere is not None:
            self._elsewhere()
        return False


class _Dispatch:
    """A module's `forward` while it is replaced: every caller gets its own replacements."""

    def __init__(self, module: nn.Module) -> None:
        # A loader (of a sharded model, say) may have put a forward of its own on the instance.
        self.module, self.own, self.plain = module, module.__dict__.get("forward"), module.forward
        self.items: tuple[tuple[Hooks, Callable[..., Any]], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.plain
        for hooks, function in self.items:
            if hooks._mine():
                forward = partial(function, forward)
        return forward(*args, **kwargs)

    def drop(self, item: tuple[Hooks, Callable[..., Any]]) -> None:
        """Take one replacement away; with the last one the module is as it was."""
        with _LOCK:
            self.items = tuple(other for other in self.items if other is not item)
            if self.items:
                return
            if self.own is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.own


_eager_blocks = 0
_stance: AbstractContextManager[None] | None = None


def _eager(blocks: int) -> None:
    """Count the open blocks: compiled code runs eagerly from the first to the last."""
    global _eager_blocks, _stance
    with _LOCK:
        if _eager_blocks == 0:
            # Raises inside compiled code; then no block is open and none is counted.
            _stance = torch.compiler.set_stance("force_eager")
        _eager_blocks += blocks
        if _eager_blocks == 0 and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None
