"""The laws hold for the tiny models of every architecture and for the trained one."""

from __future__ import annotations

import pytest
import torch

import tiny
from trimtab.models.load import load
from trimtab.models.model import LanguageModel


@pytest.fixture(scope="session")
def harbor() -> LanguageModel:
    return load("harbor", dtype=torch.float32)


@pytest.fixture(scope="session", params=[*tiny.ARCHITECTURES, "harbor"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of each architecture in turn, then Harbor."""
    if request.param == "harbor":
        return request.getfixturevalue("harbor")
    return tiny.language_model(request.param)
