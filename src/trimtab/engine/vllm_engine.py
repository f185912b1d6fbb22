"""Answers written by vLLM through our serving plugin; everything else is done in this process.

vLLM starts with the first answer, in processes of its own, with the same checkpoint. Every layer of
every expected vector is registered there by itself, so that a vector in any of its layers, in any
scope that a server knows and at any strength is a sum of registered ones, and a sweep's prompts at
all strengths are one batch. What vLLM cannot answer is answered here; the log says once why.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.checks import finite
from trimtab.engine.vllm_process import Request, VllmProcess
from trimtab.engine.vllm_steps import Steps
from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import LanguageModel
from trimtab.passes.engine import Engine, source_of
from trimtab.serve.registry import largest_strength, steps_of, unserved
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import Switch, VectorSteering

logger = logging.getLogger("trimtab.engine")

Start = Callable[[LanguageModel, Path | None, Mapping[str, Any]], VllmProcess]
Texts = list[list[str]]  # [strength][prompt]
# How far apart the log-probabilities of a prompt's tokens may be, nats in the mean: kernels round
# differently, which in half precision comes to hundredths.
APART, APART_HALF = 0.005, 0.1
STRANGER = "a vector that the engine was not told of before it started"


class VllmEngine(Engine):
    """Has answers written by vLLM.

    Attributes:
        answered_here: why -> how many answers vLLM could not write.
    """

    name = "vllm"

    def __init__(self, lm: LanguageModel, *, start: Start = VllmProcess, **options: Any) -> None:
        """Take the model; vLLM is started by the first answer.

        Args:
            lm: a model that `trimtab.load` loaded; vLLM loads the same.
            start: starts vLLM.
            options: arguments of `vllm.LLM` in place of those chosen here, such as
                `tensor_parallel_size=2`, `gpu_memory_utilization=0.5` or `max_model_len=16384`.

        Raises:
            TrimtabError: a model without a source.
        """
        super().__init__(lm)
        source_of(lm, f"answers of vLLM by {lm.name!r}")
        self.answered_here: Counter[str] = Counter()
        self._start, self._options = start, options
        self._steps = Steps()
        self._registered: frozenset[str] = frozenset()
        self._process: VllmProcess | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def expect(self, vectors: Sequence[VectorSteering]) -> None:
        """Announce vectors before use; vLLM starts, or starts again, when one is used."""
        for vector in vectors:
            vector.check(self.lm)
            self._steps.add(vector)

    def answer(
        self, lever: Switch | None, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> list[str]:
        """Answer prompts greedily under a lever; see `Engine.answer`."""
        if isinstance(lever, PromptSteering) and lever.vectors is None:
            with lever.on(self.lm):
                return self.answer(None, prompts, max_new_tokens)
        local = super().answer

        def here(some: Sequence[Prompt]) -> Texts:
            return [local(lever, some, max_new_tokens)]

        if lever is None or isinstance(lever, VectorSteering):
            strengths = [0.0 if lever is None else lever.strength]
            return self._answers(lever, prompts, strengths, max_new_tokens, here)[0]
        reason = "a soft prompt" if isinstance(lever, PromptSteering) else type(lever).__name__
        self._count(f"the lever is {reason}", len(prompts))
        return here(prompts)[0]

    def rollout(
        self,
        vector: VectorSteering,
        prompts: Sequence[Prompt],
        strengths: Sequence[float],
        max_new_tokens: int,
    ) -> Texts:
        """Answer prompts greedily at every strength, all of them in one batch."""
        local = super().rollout

        def here(some: Sequence[Prompt]) -> Texts:
            return local(vector, some, strengths, max_new_tokens)

        return self._answers(vector, prompts, strengths, max_new_tokens, here)

    def close(self) -> None:
        """End vLLM's processes and remove the files that were written for them."""
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _answers(
        self,
        vector: VectorSteering | None,
        prompts: Sequence[Prompt],
        strengths: Sequence[float],
        max_new_tokens: int,
        here: Callable[[Sequence[Prompt]], Texts],
    ) -> Texts:
        whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
        if not prompts or not strengths or not whole or max_new_tokens < 1:
            return here(prompts)  # nothing to write, or something to refuse
        if vector is not None:
            vector.check(self.lm)
        strengths = [finite("a strength", m) for m in strengths]
        reason = self._why_here(vector, strengths)
        if reason:
            self._count(reason, len(prompts) * len(strengths))
            return here(prompts)
        encoded = [self.lm.encode(prompt) for prompt in prompts]
        for item in encoded:
            self.lm.check_length(len(item.ids) + max_new_tokens)
        process = self._running(vector, min(encoded, key=lambda item: len(item.ids)))
        short = [i for i, e in enumerate(encoded) if len(e.ids) + max_new_tokens <= process.longest]
        long = [i for i in range(len(prompts)) if i not in set(short)]
        ends = generation.end_ids(self.lm)
        steers = [self._steps.asked(vector, m) for m in strengths]
        requests = [Request(encoded[i].ids, steer) for steer in steers for i in short]
        found = iter(process.answer(requests, max_new_tokens, ends) if requests else [])
        texts = [[""] * len(prompts) for _ in strengths]
        for row in texts:
            for i in short:
                row[i] = generation.decode(self.lm.tokenizer, next(found), ends)
        if long:
            self._count("prompts longer than vLLM's max_model_len", len(long) * len(strengths))
            for row, added in zip(texts, here([prompts[i] for i in long]), strict=True):
                for i, text in zip(long, added, strict=True):
                    row[i] = text
        return texts

    def _why_here(self, vector: VectorSteering | None, strengths: Sequence[float]) -> str:
        """Why vLLM cannot answer, or "" where it can."""
        if self.lm.soft_count:
            return "a soft prompt is in place"
        most = max(map(abs, strengths))
        if vector is None or most == 0:
            return ""
        reason = unserved(vector)
        limit = float(torch.finfo(self.lm.model.dtype).max)
        if not reason and most > largest_strength(steps_of(vector), limit):
            reason = "a strength beyond the model's dtype"
        if not reason and self._process is not None and vector not in self._steps:
            reason = STRANGER
        return reason

    def _running(self, vector: VectorSteering | None, prompt: Encoded) -> VllmProcess:
        """The process with everything registered that a vector needs; started, or started again."""
        if vector is not None and self._process is None:
            self._steps.add(vector)
        needed = set() if vector is None else self._steps.names(vector)
        if self._process is None or not needed <= self._registered:
            self.close()
            folder = None
            if self._steps.single:
                self._folder = tempfile.TemporaryDirectory(prefix="trimtab-")
                folder = Path(self._folder.name)
                self._steps.write(folder, self.lm)
            self._registered = frozenset(self._steps.single)
            self._process = self._start(self.lm, folder, self._options)
            self._compare(self._process, prompt)
        return self._process

    @torch.no_grad()
    def _compare(self, process: VllmProcess, prompt: Encoded) -> None:
        """Refuse a vLLM that reads a prompt differently: it holds another model than this process."""
        if not 1 < len(prompt.ids) < process.longest:
            return
        theirs = torch.tensor(process.read(prompt.ids))
        (batch,) = self.lm.batches([prompt])
        ids = batch.input_ids[0, 1:, None]
        logits = self.lm.forward(batch)[0, :-1].float()
        ours = logits.log_softmax(-1).gather(-1, ids.to(logits.device))[:, 0].cpu()
        apart = float((theirs - ours).abs().mean())
        if apart > (APART if self.lm.model.dtype == torch.float32 else APART_HALF):
            self.close()
            assert self.lm.source is not None  # see __init__
            raise TrimtabError(
                asked=f"answers of vLLM by {self.lm.name!r}",
                found=f"another model in {self.lm.source.folder!r}: log-probabilities of a prompt's "
                f"tokens are {apart:.2g} nats from this one's",
                advice="save a model that was changed in memory, and load it with trimtab.load; or "
                "use the engine local",
            )

    def _count(self, reason: str, answers: int) -> None:
        if reason not in self.answered_here:
            logger.warning("Answered by transformers, not by vLLM: %s", reason)
        self.answered_here[reason] += answers
