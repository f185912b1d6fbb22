"""Tokens beyond the vocabulary, for which the embedding gives vectors of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel
from trimtab.models.opened import opened


@contextmanager
def soft_tokens(lm: LanguageModel, vectors: Tensor) -> Iterator[tuple[int, ...]]:
    """Give ids to vectors inside the block; calls of the model may then use them as tokens.

    Everything that happens to tokens by id works: padding, batches, a KV cache, generation.
    Gradients flow to `vectors`. Blocks may be nested.

    Args:
        lm: The model; only `forward` of its token embedding is replaced, for calls made inside.
        vectors: `[k, d_model]` in the units of `inputs_embeds`, what the embedding returns.

    Yields:
        The k ids, the first ones that are not in use.

    Raises:
        TrimtabError: Vectors of another width.
    """
    if vectors.ndim != 2 or vectors.shape[1] != lm.d_model:
        raise TrimtabError(
            f"soft tokens of shape {list(vectors.shape)}",
            f"a model of width {lm.d_model}",
            "give [tokens, d_model], one vector a token",
        )
    embedding: Any = lm.model.get_input_embeddings()
    count, first = vectors.shape[0], lm.known_ids

    def forward(
        inner: Callable[..., Tensor], input_ids: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        mine = (input_ids >= first) & (input_ids < first + count)
        found = inner(torch.where(mine, 0, input_ids), *args, **kwargs)
        places = (input_ids - first).clamp(0, count - 1)
        own = vectors.to(found.device, found.dtype)[places.to(found.device)]
        return torch.where(mine.to(found.device)[..., None], own, found)

    with Hooks() as hooks, opened(lm, "soft_count", count):
        hooks.around(embedding, forward)
        yield tuple(range(first, first + count))
