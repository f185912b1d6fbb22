"""Whether a soft prompt in the vocabulary is the soft prompt fed in, after a real reload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.models.chat import Encoded, Insert, Prompt
from trimtab.models.model import LanguageModel
from trimtab.models.opened import opened
from trimtab.passes.greedy import collect, greedy
from trimtab.steering.soft_tokens import soft_tokens
from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.soft.value import PromptReport, SoftPrompt
from trimtab.weights.verify import Base, load_folder

_ANSWER = 12


def check_prompt(
    draft: Draft, folder: Path, prompt: SoftPrompt, report: PromptReport, prompts: Sequence[Prompt]
) -> PromptReport:
    """Compare the checkpoint with the base model whose embedding gives the vectors themselves.

    Raises:
        TrimtabError: prompts that tokenize otherwise, or logits that differ.
    """
    base = Base(draft.base.folder, report.path, "base", None, draft.base.dtype)
    lm, baked = load_folder(base, base.folder), load_folder(base, folder)
    table: Any = lm.model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    worst, largest, equal, effect = 0.0, 1.0, True, 0.0
    if prompt.fingerprint not in ("", lm.fingerprint):
        raise base.unequal("a soft prompt made for another model")
    with soft_tokens(lm, _inputs(lm, prompt)) as soft:
        for given in prompts:
            ids = torch.tensor([_ids(baked, given, prompt, report)])
            new = torch.isin(ids, torch.tensor(report.ids))
            if ids[new].tolist() != list(report.ids):
                raise base.unequal("a prompt in which the new tokens are not what they should be")
            fed_ids = torch.where(new, ids - report.ids[0] + soft[0], ids)
            if fed_ids[0].tolist() != _meant(lm, given, prompt, soft, ids):
                raise base.unequal("a prompt tokenized otherwise")
            with torch.no_grad():
                fed = lm.model(fed_ids).logits.float()
                seen = baked.model(ids).logits.float()
                without = lm.model(torch.tensor([lm.encode(given).ids])).logits.float()
            seen = seen[..., :vocabulary]
            outside = torch.ones(vocabulary, dtype=torch.bool)
            outside[[i for i in report.ids if i < vocabulary]] = False
            worst = max(worst, float((seen - fed)[..., outside].abs().max()))
            largest = max(largest, float(fed.abs().max()))
            effect = max(effect, float((fed[0, -1] - without[0, -1]).abs().max()))
            equal = equal and _greedy(lm, fed_ids) == _greedy(baked, ids)
    allowed = base.tolerance * largest
    if not worst <= allowed:
        raise base.unequal(f"logits that differ by {worst:.3g}, {allowed:.3g} allowed")
    return replace(report, max_logit_difference=worst, equal_text=equal, effect=effect)


def _ids(
    baked: LanguageModel, given: Prompt, prompt: SoftPrompt, report: PromptReport
) -> list[int]:
    """The prompt's ids; without a chat template the tokens are written beside the text."""
    if report.in_template or not isinstance(given, str):
        return baked.encode(given).ids
    parts = ["".join(report.tokens), given]
    joined = prompt.separator.join(parts if prompt.slot != "suffix" else parts[::-1])
    return baked.encode(joined).ids


def _meant(
    lm: LanguageModel, given: Prompt, prompt: SoftPrompt, soft: tuple[int, ...], ids: Tensor
) -> list[int]:
    """What the base model is fed: the lever's own rendering, or the prompt with the start put in."""
    if prompt.slot == "start":
        plain = lm.encode(given).ids
        start = next(i for i, token in enumerate(ids[0].tolist()) if i >= len(plain) or token != plain[i])  # fmt: skip
        return [*plain[:start], *soft, *plain[start:]]
    insert = Insert(prompt.slot, ids=soft, separator=prompt.separator)
    with opened(lm, "inserts", insert):
        return lm.encode(given).ids


def _inputs(lm: LanguageModel, prompt: SoftPrompt) -> Tensor:
    """The vectors as what the embedding returns: some models scale after it, some inside it."""
    embedding: Any = lm.model.get_input_embeddings()
    first = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        bare = bool(torch.allclose(embedding(first)[0, 0], embedding.weight[0], rtol=1e-3))
    scale = layout_of(lm.model.config, lm.model.dtype).embed_scale if bare else 1.0
    return (prompt.vectors.double() / scale).to(embedding.weight.dtype)


def _greedy(lm: LanguageModel, ids: Tensor) -> list[int]:
    length = ids.shape[1]
    (batch,) = lm.batches([Encoded("", ids[0].tolist(), length, length)])
    return collect(greedy(lm, batch, None), 1, _ANSWER)[0]
