"""Tiny models, built once for the whole run; a test that changes one builds its own."""

from __future__ import annotations

import os

import pytest
import torch

import tiny
from trimtab.models.model import LanguageModel

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

_MADE: dict[tuple[str, bool], LanguageModel] = {}


def tiny_model(architecture: str, template: bool = True) -> LanguageModel:
    key = (architecture, template)
    if key not in _MADE:
        _MADE[key] = tiny.language_model(architecture, template)
    return _MADE[key]


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of each architecture in turn, with a chat template."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def plain() -> LanguageModel:
    """A model whose tokenizer has no chat template."""
    return tiny_model("llama", template=False)
