"""A worker: it holds the model, and does units of work one after the other."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from trimtab.errors import TrimtabError
from trimtab.models.chat import Insert
from trimtab.models.load import load
from trimtab.models.model import LanguageModel, Source
from trimtab.passes.job import Unit
from trimtab.results.journal import Notes


@dataclass(frozen=True)
class WorkerJob:
    """The model that a worker is to hold, with the driver's fingerprint, or it refuses to work.

    `threads` None leaves them to its environment; `imports` are modules that are imported first.
    """

    source: Source
    name: str
    fingerprint: str
    threads: int | None
    imports: tuple[str, ...] = ()


class Worker:
    """One process of a cluster."""

    def __init__(self, wanted: WorkerJob) -> None:
        """Load nothing yet: what fails is the error of a unit, which finds its way to the user."""
        self._wanted = wanted
        self._held: dict[str, Any] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        """The model.

        Raises:
            TrimtabError: it cannot be loaded here, or it is another one than the driver's.
        """
        wanted, source = self._wanted, self._wanted.source
        for module in wanted.imports:
            importlib.import_module(module)
        if wanted.threads is not None:
            torch.set_num_threads(wanted.threads)
        lm = load(
            source.folder,
            revision=source.revision,
            dtype=source.dtype,
            device_map=source.device_map,
            trust_remote_code=source.trust_remote_code,
        )
        lm.name, lm.source = wanted.name, source
        if lm.fingerprint != wanted.fingerprint:
            raise TrimtabError(
                asked=f"the model {wanted.name!r} on a worker",
                found=f"other weights in {source.folder!r} there",
                advice="give every machine the same folder, and save a model that was changed "
                "in memory before it is loaded",
            )
        return lm

    def work(
        self,
        key: str,
        make: Callable[[LanguageModel], Any],
        unit: Unit[Any, Any],
        known: Sequence[Mapping[str, Any]],
        context: tuple[str | None, tuple[Insert, ...]],
    ) -> Iterator[tuple[str, Any]]:
        """Do one unit; yield ("step", entry) for what it notes, then ("result", what it returns).

        `known` are steps that were finished before; `context` is what prompts get besides their own
        text, as on the driver.
        """
        said: SimpleQueue[tuple[str, Any]] = SimpleQueue()

        def run() -> None:
            try:
                self.lm.system, self.lm.inserts = context
                if key not in self._held:
                    self._held = {key: make(self.lm)}  # the job before is not needed any more
                said.put(("result", unit(self._held[key], _Told(known, said))))
            except BaseException as error:
                said.put(("error", error))

        # A thread, because a unit calls its notes where a generator would have to yield.
        thread = Thread(target=run, daemon=True)
        thread.start()
        kind = ""
        while kind != "result":
            kind, value = said.get()
            if kind == "error":
                raise value
            yield kind, value
        thread.join()


class _Told(Notes):
    """Notes whose new entries are handed on."""

    def __init__(
        self, known: Sequence[Mapping[str, Any]], said: SimpleQueue[tuple[str, Any]]
    ) -> None:
        super().__init__(known)
        self._said = said

    def add(self, entry: Mapping[str, Any]) -> None:
        super().add(entry)
        self._said.put(("step", self.entries[-1]))
