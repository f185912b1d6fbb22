"""Independent pieces of work on the workers of a Ray cluster, each of which holds the model.

Ray moves work and results between its processes by pickle: join clusters of your own alone. What a
worker finished before it was lost is kept: its steps are streamed back while it works, and its piece
is taken up again from there by another worker.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from trimtab.engine.worker import Worker, WorkerJob
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine, source_of
from trimtab.passes.job import Held, Job, Result, Unit
from trimtab.results.journal import Notes

LOOPBACK = "127.0.0.1"
# A piece that takes its worker with it so often is not tried again.
MOST_LOSSES = 3
# Shared memory for what is under way between processes: prompts, texts and single vectors.
STORE_BYTES = 2**28
# Seconds without a word from any worker before the user hears that the cluster may be full.
PATIENCE = 120.0

logger = logging.getLogger("trimtab.engine")


class RayEngine(Engine):
    """Spreads units over workers; answers are written where they are asked for."""

    name = "ray"
    elsewhere = True

    def __init__(
        self,
        lm: LanguageModel,
        *,
        address: str | None = None,
        workers: int | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        """Join a cluster, or start one that lives as long as this engine; see `open_engine`.

        Workers come with the first units.

        Raises:
            TrimtabError: a model without a source, a number of workers below 1, or a cluster that
                does not answer.
        """
        super().__init__(lm)
        source = source_of(lm, f"workers that hold {lm.name!r}")
        on_gpu = lm.device.type == "cuda"
        slots = torch.cuda.device_count() if on_gpu else (os.cpu_count() or 1)
        self.workers = slots if workers is None else workers
        if self.workers < 1:
            raise TrimtabError(
                asked=f"{workers} workers", found="no count", advice="give a whole number from 1"
            )
        self._started = not ray.is_initialized()
        if self._started:
            _join(address, self.workers, self.workers if on_gpu else 0)
        threads = None if address else max(1, torch.get_num_threads() // self.workers)
        self._wanted = WorkerJob(source, lm.name, lm.fingerprint, threads, tuple(imports))
        self._make = ray.remote(Worker).options(
            num_cpus=1, num_gpus=int(on_gpu), max_restarts=0, max_task_retries=0
        )
        self._actors: list[Any] = []

    def map(
        self,
        job: Job[Held],
        units: Sequence[Unit[Held, Result]],
        *,
        notes: Notes | None = None,
        done: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """Do the units on the workers, as many at a time as there are; see `Engine.map`."""
        kept = Notes() if notes is None else notes
        found: dict[int, Result] = {}
        losses: Counter[int] = Counter()
        waiting, busy = deque(range(len(units))), {}
        while len(self._actors) < min(self.workers, len(units)):
            self._actors.append(self._make.remote(self._wanted))
        free = list(self._actors)

        def lose(number: int, actor: Any, error: RayActorError) -> None:
            losses[number] += 1
            if losses[number] == MOST_LOSSES:
                raise TrimtabError(
                    asked=f"a piece of work that lost {MOST_LOSSES} workers",
                    found=str(error).strip().splitlines()[0],
                    advice="it probably needs more memory than a worker has: use fewer --workers, or "
                    "a machine with more",
                ) from error
            # Not restarted by Ray: a unit sent to an actor that restarts is refused, not kept.
            ray.kill(actor)
            self._actors.remove(actor)
            self._actors.append(self._make.remote(self._wanted))
            free.append(self._actors[-1])
            waiting.appendleft(number)

        while waiting or busy:
            while waiting and free:
                number, actor = waiting.popleft(), free.pop(0)
                stream = actor.work.remote(
                    job.key, job.make, units[number], kept.entries, self.lm.context
                )
                busy[stream] = number, actor
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=PATIENCE)
            if not ready:
                free_now = ray.available_resources()
                logger.warning("Waiting for workers; the cluster has free: %s", free_now)
                continue
            stream: Any = ready[0]
            number, actor = busy[stream]
            try:
                kind, value = ray.get(next(stream))
            except RayTaskError as error:
                # The user's error if it is one of ours, else Ray's, with its traceback.
                raise (error.cause if isinstance(error.cause, TrimtabError) else error) from None
            except RayActorError as error:
                busy.pop(stream)
                lose(number, actor, error)
                continue
            if kind == "step":
                kept.add(value)
                continue
            found[number] = value
            busy.pop(stream)
            free.append(actor)
            if done is not None:
                done(number, value)
        return [found[number] for number in range(len(units))]

    def close(self) -> None:
        """End the workers, and the cluster if this engine started it."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()


def _join(address: str | None, workers: int, gpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TrimtabError(
                asked=f"the Ray cluster at {address}",
                found=str(error).strip().splitlines()[0],
                advice="start it with `ray start --head`, and give the address that it prints",
            ) from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=workers,
        num_gpus=gpus or None,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        _node_ip_address=LOOPBACK,
        # Workers find what this process finds.
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        **quiet,
    )
    listening = ray.util.get_node_ip_address()
    if listening != LOOPBACK:
        ray.shutdown()
        raise TrimtabError(
            asked="a Ray cluster on this machine alone",
            found=f"one that listens on {listening}, since Ray had been imported before",
            advice="open the engine before ray is imported, or call ray.init yourself",
        )
