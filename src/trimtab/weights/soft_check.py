"""Whether a soft prompt in the vocabulary is the soft prompt fed in, after a real reload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.chat import Prompt
from trimtab.model import LanguageModel
from trimtab.weights.draft import Draft
from trimtab.weights.layout import layout_of
from trimtab.weights.soft_prompt import PromptReport, SoftPrompt
from trimtab.weights.verify import Base, load_folder, tolerance, unequal

_ANSWER = 12


def check_prompt(
    draft: Draft, folder: Path, prompt: SoftPrompt, report: PromptReport, prompts: Sequence[Prompt]
) -> PromptReport:
    """Compare the checkpoint with the base model whose embedding gives the vectors themselves.

    Raises:
        TrimtabError: prompts that tokenise otherwise, or logits that differ.
    """
    target = report.path
    source = Base(draft.base.folder, "base", None, draft.base.dtype)
    lm = load_folder(source, draft.base.folder, target)
    baked = load_folder(source, folder, target)
    table: Any = lm.model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    worst, largest, equal, effect = 0.0, 1.0, True, 0.0
    for given in prompts:
        ids = torch.tensor([_ids(baked, given, report)])
        new = torch.isin(ids, torch.tensor(report.ids))
        plain = ids[~new][None]
        found = "a prompt in which the new tokens are not what they should be"
        _require(ids[new].tolist() == list(report.ids), target, found)
        _require(plain[0].tolist() == lm.encode(given).ids, target, "a prompt tokenised otherwise")
        with torch.no_grad():
            with _fed(lm, new, prompt):
                fed = lm.model(torch.where(new, 0, ids)).logits.float()
            seen = baked.model(ids).logits.float()
            without = lm.model(plain).logits.float()
        seen = seen[..., :vocabulary]
        outside = torch.ones(vocabulary, dtype=torch.bool)
        outside[[i for i in report.ids if i < vocabulary]] = False
        worst = max(worst, float((seen - fed)[..., outside].abs().max()))
        largest = max(largest, float(fed.abs().max()))
        effect = max(effect, float((fed[0, -1] - without[0, -1]).abs().max()))
        with _fed(lm, new, prompt):
            equal = equal and _greedy(lm, torch.where(new, 0, ids)) == _greedy(baked, ids)
    allowed = tolerance(source.dtype) * largest
    _require(worst <= allowed, target, f"logits that differ by {worst:.3g}, {allowed:.3g} allowed")
    return replace(report, max_logit_difference=worst, equal_text=equal, effect=effect)


def _require(met: bool, target: Path, found: str) -> None:
    if not met:
        raise unequal(target, found)


def _ids(baked: LanguageModel, prompt: Prompt, report: PromptReport) -> list[int]:
    """The prompt's ids; without a chat template the tokens are written in front of the text."""
    if report.in_template or not isinstance(prompt, str):
        return baked.encode(prompt).ids
    return baked.encode("".join(report.tokens) + prompt).ids


@contextmanager
def _fed(lm: LanguageModel, new: Tensor, prompt: SoftPrompt) -> Iterator[None]:
    """Let the embedding give the soft prompt's vectors where the new tokens stand."""
    embedding: Any = lm.model.get_input_embeddings()
    first = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        bare = bool(torch.allclose(embedding(first)[0, 0], embedding.weight[0], rtol=1e-3))
    # Some models scale after the embedding, some inside it.
    scale = _scale(lm) if bare else 1.0
    vectors = (prompt.vectors.double() / scale).to(embedding.weight.dtype)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Longer inputs hold an answer so far; the new tokens stand where they stood.
        output = output.clone()
        output[:, : new.shape[1]][:, new[0]] = vectors
        return output

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _scale(lm: LanguageModel) -> float:
    return layout_of(lm.model.config, lm.model.dtype).embed_scale


def _greedy(lm: LanguageModel, ids: Tensor) -> list[int]:
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(_ANSWER):
            token = int(lm.model(ids).logits[0, -1].argmax())
            answer.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return answer
