"""Damage and spill: per-token KL(unsteered || steered) along unsteered answers, in nats.

Both models read the same answer tokens (teacher forcing), so position t compares two predictions
of the token after the same t tokens. A prompt lever changes what stands before the answer, never
the answer: positions are aligned from the end. The token that would end the answer counts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from trimtab.errors import TrimtabError
from trimtab.models.chat import Encoded, Prompt
from trimtab.models.model import Batch, LanguageModel
from trimtab.models.probe import text_config
from trimtab.passes.fan import Fan
from trimtab.results.intervals import ratio_bootstrap
from trimtab.results.quantiles import quantile
from trimtab.steering.vector import Switch, VectorSteering

# One float32 tensor of logits holds at most this many numbers (256 MiB), whatever the vocabulary.
LOGITS_PER_BATCH = 2**26
# Reference log-probabilities are kept between levers when all of them fit in this many bytes.
CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Divergence:
    """KL per token in nats: mean and 95th percentile over all tokens of all answers.

    Attributes:
        mean: over tokens.
        p95: 95th percentile over tokens.
        low: lower end of the mean's interval, prompts resampled.
        high: upper end.
        n: number of prompts.
        tokens: number of tokens.
    """

    mean: float
    p95: float
    low: float
    high: float
    n: int
    tokens: int


def summarize(per_token: Sequence[torch.Tensor], seed: int = 0) -> Divergence:
    """Summarize the KL of a `Reference`, one tensor `[tokens]` per prompt.

    Raises:
        TrimtabError: when no answer has a token.
    """
    used = [values.double().cpu() for values in per_token if values.numel() > 0]
    if not used:
        raise TrimtabError(
            asked="the divergence along unsteered answers",
            found="answers without a single token",
            advice="give prompts that the unsteered model answers, and at least one new token",
        )
    pooled = torch.cat(used)
    mean = low = high = math.inf  # where the steered model gives some token no probability at all
    if not bool(pooled.isinf().any()):
        mean = pooled.mean().item()
        low, high = ratio_bootstrap([v.sum().item() for v in used], [v.numel() for v in used], seed)
    p95 = quantile(pooled.sort().values, 0.95)
    return Divergence(mean, p95, max(low, 0.0), high, len(used), pooled.numel())


class Reference:
    """The unsteered model's answers, one per prompt, shared by all levers compared along them."""

    def __init__(
        self, lm: LanguageModel, prompts: Sequence[Prompt], answers: Sequence[str]
    ) -> None:
        self.lm = lm
        self.prompts, self.answers = list(prompts), list(answers)
        self.encoded = [
            lm.encode(prompt, completion=answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        vocabulary = int(text_config(lm.model).vocab_size)
        self.max_tokens = min(8192, max(256, LOGITS_PER_BATCH // vocabulary))
        tokens = sum(_answer_tokens(encoded) for encoded in self.encoded)
        self._keeps = tokens * vocabulary * 4 <= CACHE_BYTES
        self._kept: dict[int, torch.Tensor] = {}

    def kl(
        self, steering: Switch | None = None, other: LanguageModel | None = None
    ) -> list[torch.Tensor]:
        """Return KL(p_unsteered || p_steered) at every answer position, in nats.

        Args:
            steering: the lever, switched on for the second reading.
            other: a second model (a baked checkpoint) instead of a steering; same vocabulary.

        Returns:
            One float64 tensor `[answer tokens + end token]` per prompt, in the order given.

        Raises:
            TrimtabError: for another vocabulary.
        """
        assert (steering is None) != (other is None), "give exactly one of steering and other"
        context = self._steered_context(steering) if steering is not None else self.encoded
        steered_lm = self.lm if other is None else other
        result: list[torch.Tensor] = [torch.empty(0, dtype=torch.float64)] * len(context)
        for batch in self.lm.batches(context, max_tokens=self.max_tokens):
            rows = batch.rows.tolist()
            reference = self._reference(rows)
            with steering.on(self.lm) if steering is not None else nullcontext():
                steered = _log_probs(steered_lm, batch, context)
            for row, log_q in zip(rows, steered, strict=True):
                result[row] = token_kl(reference[row], log_q)
        return result

    def kl_many(
        self, vector: VectorSteering, strengths: Sequence[float]
    ) -> list[list[torch.Tensor]]:
        """Return the per-token KL at every strength; equal to `kl(vector.at(m))` one by one.

        What no strength changes is read once (`trimtab.passes.fan`).
        """
        counts = [_answer_tokens(encoded) for encoded in self.encoded]
        rows = [row for row, count in enumerate(counts) if count]
        moving = sorted({float(m) for m in strengths} - {0.0})
        found = {m: self.zeros() for m in (*moving, 0.0)}
        if not rows or not moving:
            return [list(found[float(m)]) for m in strengths]
        # Nothing is predicted from the last token.
        read = [replace(self.encoded[row], ids=self.encoded[row].ids[:-1]) for row in rows]
        fan = Fan(self.lm, vector, read, [counts[row] for row in rows])
        for part in fan.parts(moving, unsteered=not self._keeps):
            places = [rows[place] for place in part.prompts]
            reference = self._reference(places) if self._keeps else {}
            for i, row in enumerate(places):
                if part.unsteered is not None:
                    own = torch.log_softmax(part.unsteered[i, -counts[row] :], dim=-1)
                else:
                    own = reference[row]
                steered = torch.log_softmax(part.logits[:, i, -counts[row] :], dim=-1)
                for place, values in zip(part.strengths, token_kl(own, steered), strict=True):
                    found[moving[place]][row] = values
        return [list(found[float(m)]) for m in strengths]

    def zeros(self) -> list[torch.Tensor]:
        """Return the divergence of the unsteered model from itself, 0 by definition."""
        return [torch.zeros(_answer_tokens(e), dtype=torch.float64) for e in self.encoded]

    def _steered_context(self, steering: Switch) -> list[Encoded]:
        """Put the same answer tokens after the prompt as the lever renders it."""
        before = self.lm.context
        with steering.on(self.lm):
            if self.lm.context == before:
                return self.encoded
            rendered = [
                self.lm.encode(prompt, completion=answer)
                for prompt, answer in zip(self.prompts, self.answers, strict=True)
            ]
        context: list[Encoded] = []
        for there, own in zip(rendered, self.encoded, strict=True):
            # Tokenized after another prompt, the answer's first letters may fall to other tokens.
            ids = [*there.ids[: there.prompt_length], *own.ids[own.prompt_length :]]
            context.append(there if ids == there.ids else replace(there, ids=ids))
        return context

    def _reference(self, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the unsteered log-probabilities `[answer tokens, vocabulary]` of these rows."""
        if all(row in self._kept for row in rows):
            return {row: self._kept[row] for row in rows}
        computed: dict[int, torch.Tensor] = {}
        own = [self.encoded[row] for row in rows]
        for part in self.lm.batches(own, max_tokens=self.max_tokens):
            values = _log_probs(self.lm, part, own)
            computed |= {rows[p]: v for p, v in zip(part.rows.tolist(), values, strict=True)}
        if self._keeps:
            self._kept |= computed
        return computed


def _answer_tokens(encoded: Encoded) -> int:
    return len(encoded.ids) - encoded.prompt_length


def _log_probs(lm: LanguageModel, batch: Batch, texts: Sequence[Encoded]) -> list[torch.Tensor]:
    """Return float32 log-probabilities `[tokens, vocabulary]` of each row's answer."""
    counts = [_answer_tokens(texts[row]) for row in batch.rows.tolist()]
    with torch.no_grad():
        logits = lm.forward(batch.to(lm.device), logits_to_keep=max(counts) + 1)
        width = logits.shape[1]  # rows are padded on the left: all of them end in the last column
        return [
            torch.log_softmax(logits[i, width - 1 - count : width - 1].float(), dim=-1)
            for i, count in enumerate(counts)
        ]


def token_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of log-probabilities `[..., vocabulary]` in nats, float64 on the CPU."""
    if log_p.shape[-1] != log_q.shape[-1]:
        raise TrimtabError(
            asked="the divergence between two models",
            found=f"vocabularies of {log_p.shape[-1]} and {log_q.shape[-1]} tokens",
            advice="compare a model with a checkpoint made from it",
        )
    log_q = log_q.to(log_p.device)
    p = log_p.exp()
    # 0 log 0 = 0: entries that are masked out with -inf would give NaN
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    device = terms.device if terms.device.type != "mps" else torch.device("cpu")  # no float64 there
    return terms.to(device).sum(dim=-1, dtype=torch.float64).clamp_min(0).cpu()
