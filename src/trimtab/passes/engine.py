"""The engine that does everything in this process, which is also the contract of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType

from trimtab.errors import TrimtabError
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel, Source
from trimtab.passes.job import Held, Job, Result, Unit
from trimtab.passes.rollout import rollout
from trimtab.results.journal import Notes
from trimtab.steering.vector import Switch, VectorSteering


def source_of(lm: LanguageModel, asked: str) -> Source:
    """Return what another process loads the same model from.

    Raises:
        TrimtabError: a model that was made in memory.
    """
    if lm.source is None:
        raise TrimtabError(
            asked=asked,
            found="a model that was made in memory",
            advice="save it with save_pretrained, and load the folder with trimtab.load",
        )
    return lm.source


class Engine:
    """Does work here, one piece after the other.

    Attributes:
        lm: the model that everything is measured on.
        name: what users type.
        elsewhere: whether units run in other processes, whose model calls nobody counts here.
    """

    name = "local"
    elsewhere = False

    def __init__(self, lm: LanguageModel) -> None:
        """Take the model."""
        self.lm = lm

    def map(
        self,
        job: Job[Held],
        units: Sequence[Unit[Held, Result]],
        *,
        notes: Notes | None = None,
        done: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """Do independent pieces of work; the results stand in the order of the units.

        Args:
            job: what every unit works with.
            units: called as `unit(held, notes)`; a function of a module, or a `functools.partial`
                of one, since it may have to cross to another process. What it returns depends on
                its arguments alone: a piece whose worker is lost is done again.
            notes: where units write their finished steps, and find those of an earlier run or of
                a worker that was lost. Units tell their own steps from each other's.
            done: called with a unit's number and result as soon as it is there.

        Raises:
            TrimtabError: What a unit raised.
        """
        kept, results = Notes() if notes is None else notes, []
        for number, unit in enumerate(units):
            results.append(unit(job.here, kept))
            if done is not None:
                done(number, results[-1])
        return results

    def expect(self, vectors: Sequence[VectorSteering]) -> None:
        """Announce vectors before use, in any layers, scopes and strengths, so that an engine can register them."""

    def answer(
        self, lever: Switch | None, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> list[str]:
        """Answer prompts greedily under a lever; under None by the model as it is."""
        with nullcontext() if lever is None else lever.on(self.lm):
            return self.lm.generate(list(prompts), max_new_tokens=max_new_tokens)

    def rollout(
        self,
        vector: VectorSteering,
        prompts: Sequence[Prompt],
        strengths: Sequence[float],
        max_new_tokens: int,
    ) -> list[list[str]]:
        """Answer prompts greedily at every strength; see `trimtab.passes.rollout`."""
        return rollout(self.lm, vector, prompts, strengths, max_new_tokens=max_new_tokens)

    def close(self) -> None:
        """Let go of processes; the engine is of no use afterwards."""

    def __enter__(self) -> Engine:
        """Return the engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()
