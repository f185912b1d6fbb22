"""LanguageModel: any Hugging Face causal language model with its tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import cast, overload

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.arguments import MAX_NEW_TOKENS
from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.batch import Batch, padded
from trimtab.models.chat import Encoded, Insert, Message, Prompt, render
from trimtab.models.fingerprint import fingerprint
from trimtab.models.opened import opened, values
from trimtab.models.probe import text_config
from trimtab.models.sites import Sites, find_sites

__all__ = ["Batch", "LanguageModel", "Source"]


@dataclass(frozen=True)
class Source:
    """What a model was loaded from: another process loads the same from it.

    Attributes:
        folder: The folder or hub id that transformers was given.
        revision: Of a hub repository.
        dtype: Of the weights as they are now, such as "float32".
        device_map: See `load`.
        trust_remote_code: See `load`.
    """

    folder: str
    revision: str | None
    dtype: str
    device_map: str | dict[str, int | str] | None
    trust_remote_code: bool


class LanguageModel:
    """A causal language model and its tokenizer, unmodified.

    Attributes:
        model: The Hugging Face model; put in eval mode, its `requires_grad` flags left alone.
        tokenizer: Its tokenizer.
        name: Where it came from.
        source: What `load` loaded it from; None for a model that was made otherwise.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None
    ) -> None:
        """Wrap a model.

        Raises:
            TrimtabError: The model is no decoder-only language model that can generate.
        """
        if not hasattr(model, "generate") or not hasattr(model, "config"):
            raise TrimtabError(
                f"a language model from {type(model).__name__}",
                "no config or no generate method",
                "give a Hugging Face causal language model, such as AutoModelForCausalLM loads",
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise TrimtabError(
                f"a language model from {type(model).__name__}",
                "an encoder-decoder model",
                "give a decoder-only (causal) language model",
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._system: str | None = None
        self._inserts: tuple[Insert, ...] = ()
        self.source: Source | None = None

    def __repr__(self) -> str:
        """One line: name, architecture and size."""
        kind = type(self.model).__name__
        return f"LanguageModel({self.name!r}, {kind}, {self.n_layers} layers, width {self.d_model})"

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def system(self) -> str | None:
        """A system text that every rendered prompt gets: the innermost open one, or what was set."""
        return (values(self, "system") or [self._system])[-1]

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text

    @property
    def inserts(self) -> tuple[Insert, ...]:
        """What else every rendered prompt gets, see `trimtab.models.chat.Insert`; open ones come last."""
        return (*self._inserts, *values(self, "inserts"))

    @inserts.setter
    def inserts(self, inserts: tuple[Insert, ...]) -> None:
        self._inserts = inserts

    @property
    def soft_count(self) -> int:
        """Ids beyond the vocabulary that the embedding answers for just now."""
        return sum(values(self, "soft_count"))

    @property
    def active_batch(self) -> Batch | None:
        """The batch whose calls are being made (see `calling`), or None."""
        return (values(self, "active_batch") or [None])[-1]

    @property
    def known_ids(self) -> int:
        """How many ids the embedding answers for."""
        return next(self.model.get_input_embeddings().parameters()).shape[0] + self.soft_count

    @property
    def context(self) -> tuple[str | None, tuple[Insert, ...]]:
        """What prompts get besides their own text."""
        return self.system, self.inserts

    @cached_property
    def sites(self) -> Sites:
        """The places that can be read and written, found at first use by one tiny forward."""
        return find_sites(self.model)

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture and every weight; see `trimtab.models.fingerprint`."""
        state = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        known = getattr(self, "_fingerprint", None)
        if known is None or known[0] != state:
            known = self._fingerprint = (state, fingerprint(self.model))
        return known[1]

    def encode(self, prompt: Prompt, completion: str | None = None) -> Encoded:
        """Render and tokenize a prompt, with `self.system` and `self.inserts`.

        Raises:
            TrimtabError: The prompt has no known form, or its tokens are not in the model's
                vocabulary.
        """
        encoded = render(self.tokenizer, prompt, self.system, completion, self.inserts)
        if max(encoded.ids) >= self.known_ids:
            raise TrimtabError(
                f"prompt {prompt!r}",
                f"token {max(encoded.ids)} in a model with {self.known_ids} embeddings",
                "use the tokenizer that belongs to the model",
            )
        return encoded

    def batches(
        self, encoded: Sequence[Encoded], max_tokens: int = 8192, max_rows: int = 128
    ) -> Iterator[Batch]:
        """Group prompts of similar length, longest first, so that too large a batch shows at once.

        Args:
            encoded: What `encode` returned.
            max_tokens: Most tokens of a batch, padding counted; a single longer prompt is a batch
                of its own.
            max_rows: Most prompts of a batch.

        Returns:
            Batches on the model's device; `rows` says where each prompt stood.
        """
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].ids))
        start = 0
        while start < len(order):
            width = len(encoded[order[start]].ids)
            rows = order[start : start + max(1, min(max_rows, max_tokens // width))]
            chosen = [encoded[row] for row in rows]
            yield padded(chosen, rows, width, generation.pad_id(self.tokenizer)).to(self.device)
            start += len(rows)

    def calling(self, batch: Batch) -> AbstractContextManager[None]:
        """Tell steering where the prompts end in the calls of the model made inside.

        Calls inside may feed the prompt whole, in chunks with `past_key_values`, or token by token.
        """
        return opened(self, "active_batch", batch)

    def forward(self, batch: Batch, logits_to_keep: int = 0) -> Tensor:
        """Logits `[batch, seq, vocab]` of a batch, without a cache.

        Gradients flow unless the caller forbids them (`torch.no_grad()` saves much memory).

        Args:
            batch: From `batches`.
            logits_to_keep: Only this many last positions; 0 for all.
        """
        self.check_length(batch.input_ids.shape[1])
        return feed(self, batch, batch.input_ids, batch.attention_mask, None, logits_to_keep)

    @torch.no_grad()
    def next_logits(self, prompts: Prompt | Sequence[Prompt]) -> Tensor:
        """Logits at the first answer position of each prompt.

        Returns:
            float32 `[prompts, vocab]` on the CPU, in the caller's order.
        """
        return self.logits_after([self.encode(prompt) for prompt in _listed(prompts)[0]])

    @torch.no_grad()
    def logits_after(self, encoded: Sequence[Encoded]) -> Tensor:
        """Logits of the token after each of one or more encoded prompts, as in `next_logits`."""
        result = torch.empty(0)
        for batch in self.batches(encoded):
            logits = self.forward(batch, logits_to_keep=1)[:, -1].float().cpu()
            if not len(result):  # as wide as the logits, which may be wider than the tokenizer
                result = logits.new_empty(len(encoded), logits.shape[-1])
            result[batch.rows.cpu()] = logits
        return result

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
        use_cache: bool = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[Message]] | list[Prompt] | tuple[Prompt, ...],
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
        use_cache: bool = ...,
    ) -> list[str]: ...

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        use_cache: bool = True,
    ) -> str | list[str]:
        """Answer one prompt, or each of a list; special tokens are dropped.

        Threads and asyncio tasks may share one model: each gets the answers that it would get
        alone, steered by the `with` blocks that it entered itself (see `VectorSteering.on`).

        Args:
            prompt: A string or a conversation (one answer), or a list of them (a list of answers).
            max_new_tokens: Most tokens of an answer.
            temperature: 0 is greedy; else plain sampling from the softmax at this temperature, with
                no top-k or top-p, whatever the model's own generation settings say.
            seed: Of the sampling; the global random state is neither read nor changed.
            use_cache: Whether to keep keys and values.

        Raises:
            TrimtabError: No prompts, or a number out of range.
        """
        if (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or max_new_tokens < 0
        ):
            raise TrimtabError(
                f"max_new_tokens={max_new_tokens!r}",
                "no count of tokens",
                "give a whole number from 0",
            )
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not 0 <= temperature < float("inf"):
            raise TrimtabError(
                f"temperature={temperature!r}",
                "no temperature",
                "give 0 (greedy) or a positive number",
            )
        listed, single = _listed(prompt)
        encoded = [self.encode(item) for item in listed]
        for item in encoded:
            self.check_length(len(item.ids) + max_new_tokens)
        stops = generation.end_ids(self)
        found = generation.answer_ids(self, encoded, max_new_tokens, temperature, seed, use_cache)
        answers = [generation.decode(self.tokenizer, ids, stops) for ids in found]
        return answers[0] if single else answers

    @cached_property
    def forward_arguments(self) -> frozenset[str]:
        """Names that the model's forward takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    def check_length(self, length: int) -> None:
        """Refuse what learned absolute positions cannot hold; rotary ones stretch."""
        limit = self._position_limit
        if limit is not None and length > limit:
            raise TrimtabError(
                f"a text of {length} tokens",
                f"a model with {limit} positions",
                "shorten the prompt or lower max_new_tokens",
            )

    @cached_property
    def _position_limit(self) -> int | None:
        tokens = self.model.get_input_embeddings()
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Embedding) and module is not tokens:
                if module.num_embeddings == limit:
                    return module.num_embeddings
        return None


def feed(
    lm: LanguageModel, batch: Batch, ids: Tensor, mask: Tensor, cache: Cache | None, keep: int
) -> Tensor:
    """Feed tokens after a cache, which grows by them; None for no cache.

    Args:
        lm: The model.
        batch: The prompts that the tokens belong to.
        ids: `[batch, seq]`.
        mask: 1 for a token, 0 for padding, those in the cache before these `[batch, cached + seq]`.
        cache: Keys and values of the tokens before.
        keep: Last positions to give logits of, `[batch, keep, vocab]`; 0 for all.
    """
    arguments: dict[str, object] = {}
    if "position_ids" in lm.forward_arguments:
        # From the mask: a model with absolute position embeddings counts padding otherwise.
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if keep and "logits_to_keep" in lm.forward_arguments:
        arguments["logits_to_keep"] = keep
    if cache is not None:
        arguments["past_key_values"] = cache
    with lm.calling(batch):
        output = lm.model(
            input_ids=ids, attention_mask=mask, use_cache=cache is not None, **arguments
        )
    return output.logits[:, -keep:]


def _listed(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether one was given alone."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (list, tuple)) and prompts:
        if all(isinstance(item, dict) for item in prompts):
            return [cast("list[Message]", list(prompts))], True
        if all(isinstance(item, (str, list, tuple)) for item in prompts):
            return cast("list[Prompt]", list(prompts)), False
    raise TrimtabError(
        f"prompts {prompts!r}",
        "an empty list" if isinstance(prompts, (list, tuple)) and not prompts else "no prompts",
        "give a string, a conversation, or a list of them that is not empty",
    )
