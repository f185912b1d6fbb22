"""Trimtab's model inside the harness lm-eval, which is told where every prompt ends.

Imported only where lm-eval is installed. The harness pads without a mask and keeps to itself where
a context ends and a continuation begins; here its requests go through `lm.forward` and
`lm.calling`, so that every scope means what it means elsewhere and padding is never steered.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.models.batch import Batch
from trimtab.models.chat import Encoded, Message, render
from trimtab.models.model import LanguageModel
from trimtab.models.tokenize import tokenize

HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

# Stands in for a user's text while the template is asked what it writes after one.
_MARKER = "trimtab0marker0text"

Asked = tuple[Any, list[int], list[int]]


class HarnessModel(HFLM):
    """The harness's Hugging Face model around a `LanguageModel`, steered by what is on."""

    def __init__(self, lm: LanguageModel, batch_size: int) -> None:
        self.lm = lm
        # The tokenizer is copied, because the harness may give it a padding token.
        super().__init__(lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=batch_size)
        self._template_tail = _template_tail(lm)
        self._tails: list[int] = []

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the hub about a model that is in memory."""
        return {}

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, with what a prompt lever puts into it."""
        system, inserts = self.lm.context
        if system is None and not inserts:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        begun = ""
        if not add_generation_prompt:
            *chat_history, last = chat_history
            begun = last["content"]
        return render(self.lm.tokenizer, chat_history, system, inserts=inserts).text + begun

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Score continuations, without the harness's progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, without the harness's progress bars."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer prompts, without the harness's progress bars."""
        return super().generate_until(requests, disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Asked], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score each continuation given its context: (sum of log-probabilities, is it greedy?).

        Continuations that differ in their last token alone share a row.
        """
        members: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for number, request in enumerate(requests):
            members.setdefault(self._row(request), []).append(number)
        rows = [Encoded("", list(ids), prompt, end) for ids, prompt, end in members]
        numbers = list(members.values())
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self.lm.batches(rows, max_rows=self.batch_size):
            asked = [numbers[row] for row in batch.rows.tolist()]
            longest = max(len(requests[number][2]) for group in asked for number in group)
            logits = self.lm.forward(batch, logits_to_keep=longest)
            for row, group in enumerate(asked):
                for number in group:
                    found[number] = _score(logits[row], requests[number][2])
        return found

    def _row(self, request: Asked) -> tuple[tuple[int, ...], int, int]:
        """A request's tokens but the last, and where its prompt and its instruction end."""
        texts, context, continuation = request
        whole = context + continuation
        # The tokens of a rolling text come without strings: the prompt is what is not scored.
        prompt = instruction = len(context)
        if texts is not None and texts[0]:
            prompt, instruction = self._boundaries("".join(texts), len(texts[0]), whole, prompt)
        cut = max(0, len(whole) - (self.max_length + 1))
        return tuple(whole[cut:-1]), max(prompt - cut, 0), max(instruction - cut, 0)

    def _boundaries(self, text: str, end: int, ids: list[int], split: int) -> tuple[int, int]:
        """How many of a text's tokens belong to its first `end` characters, and to the user's part.

        The harness counts white space at the end of a context as the continuation's; for a scope it
        is the prompt's. Tokens that are not the text's own leave only the harness's `split`.
        """
        for special in (True, False):
            made, count = tokenize(self.tokenizer, text, special)
            if made == ids:
                prompt = count(end, False)
                user_end = text.rfind(self._template_tail, 0, end) if self._template_tail else -1
                return prompt, prompt if user_end < 0 else min(count(user_end, True), prompt)
        return split, split

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """Tokenize contexts of answers, and remember how many tokens follow each user's text."""
        self._tails = []
        for text in strings:
            ids: list[int] = self.tok_encode(text)
            prompt, instruction = self._boundaries(text, len(text), ids, len(ids))
            self._tails.append(prompt - instruction)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs["attention_mask"]
        prompt = mask.sum(1)
        tails = torch.tensor(self._tails, device=prompt.device)
        rows = torch.arange(len(prompt))
        batch = Batch(context, mask, prompt, (prompt - tails).clamp(min=0), rows)
        with self.lm.calling(batch):
            return super()._model_generate(context, *args, **kwargs)


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum the log-probabilities of a continuation from the last of a row's logits `[seq, vocab]`."""
    log_probs = logits[-len(continuation) :].float().log_softmax(-1)
    ids = torch.tensor(continuation, device=log_probs.device)
    total = log_probs.gather(-1, ids[:, None]).double().sum().item()
    return total, bool((log_probs.argmax(-1) == ids).all())


def _template_tail(lm: LanguageModel) -> str:
    """What the chat template writes after the last user text; empty where there is no template."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return ""
    return render(lm.tokenizer, _MARKER).text.rpartition(_MARKER)[2]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's messages and progress bars off stderr; Trimtab shows its own."""
    datasets: Any = importlib.import_module("datasets")
    tasks: Any = importlib.import_module("lm_eval.api.task")
    logger = logging.getLogger("lm_eval")
    level, hidden, bar = logger.level, datasets.are_progress_bars_disabled(), tasks.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tasks.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        tasks.tqdm = bar
        logger.setLevel(level)
        if not hidden:
            datasets.enable_progress_bars()
