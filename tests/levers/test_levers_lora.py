"""A LoRA trained through peft: it learns, the model stays as it was, and the hooks are peft's sums."""

from __future__ import annotations

import sys

import pytest
import torch

import tiny
from planted import behavior
from trimtab.errors import TrimtabError
from trimtab.levers.lora import train_lora
from trimtab.models.model import LanguageModel


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_lora_learns_and_the_hooks_are_what_peft_computes(name: str) -> None:
    lm = tiny.language_model(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    flags = [p.requires_grad for p in lm.model.parameters()]
    chosen = behavior(prompt_toward="Say Z.")
    done = train_lora(lm, chosen, steps=5, batch_size=4, tokens=6, rank=2, learning_rate=0.02)
    assert done.loss < done.loss_start
    assert done.difference < 1e-4
    assert done.lever.rank == 2 and done.calls > 0
    assert all(torch.equal(before[key], value) for key, value in lm.model.state_dict().items())
    assert [p.requires_grad for p in lm.model.parameters()] == flags


def test_one_seed_one_adapter(llama: LanguageModel) -> None:
    chosen, writers = behavior(prompt_toward="Say Z."), [("mlp", 1)]
    first, again, other = (
        train_lora(llama, chosen, steps=2, batch_size=2, tokens=4, writers=writers, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.lever.right[writers[0]], again.lever.right[writers[0]])
    assert not torch.equal(first.lever.right[writers[0]], other.lever.right[writers[0]])
    assert set(first.lever.left) == set(writers)


def test_lora_refuses_what_it_cannot_do(llama: LanguageModel, monkeypatch) -> None:
    with pytest.raises(TrimtabError, match="rank 0"):
        train_lora(llama, behavior(), rank=0)
    with pytest.raises(TrimtabError, match="toward answers"):
        train_lora(llama, behavior(), steps=1)  # no prompt, no completions, no pairs
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[peft\]'"):
        train_lora(llama, behavior(prompt_toward="Say Z."), steps=1)
