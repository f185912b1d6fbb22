"""A model spread by `device_map`, here over main memory and disk, is the same model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from trimtab import behavior, load
from trimtab.methods import find
from trimtab.models.model import LanguageModel

PROMPTS = ["How do I borrow the rowboat?", "Where is the ferry?"]


@pytest.fixture(scope="module")
def whole() -> LanguageModel:
    return load("harbor")


@pytest.fixture(scope="module")
def spread(whole: LanguageModel) -> LanguageModel:
    """The upper half of the blocks on disk, fetched block by block."""
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    where: dict[str, int | str] = dict.fromkeys(rest, "cpu")
    for layer in range(whole.n_layers):
        where[f"model.layers.{layer}"] = "disk" if layer >= whole.n_layers // 2 else "cpu"
    return load("harbor", device_map=where)


def test_it_is_spread_and_has_the_same_fingerprint(
    whole: LanguageModel, spread: LanguageModel
) -> None:
    assert any(p.is_meta for p in spread.model.parameters())
    assert spread.fingerprint == whole.fingerprint
    assert load("harbor", device_map="auto").fingerprint == whole.fingerprint


def test_another_weight_on_disk_gives_another_fingerprint(spread: LanguageModel) -> None:
    owner = spread.model.get_submodule(f"model.layers.{spread.n_layers - 1}.mlp.down_proj")
    before, hook = spread.fingerprint, cast("Any", owner._hf_hook)
    weights = hook.weights_map
    try:
        hook.weights_map = {"weight": weights["weight"] + 1}
        del spread._fingerprint
        assert spread.fingerprint != before
    finally:
        hook.weights_map = weights
        del spread._fingerprint


@pytest.mark.parametrize(
    ("method", "options"),
    [("mean_difference", {"scope": "all"}), ("next_token", {"scope": "all", "steps": 2})],
)
def test_vectors_are_found_and_steer_alike(
    whole: LanguageModel, spread: LanguageModel, method: str, options: dict[str, object]
) -> None:
    one, two = (find(lm, behavior("mood"), method, **options) for lm in (whole, spread))  # pyright: ignore
    for layer, direction in one.directions.items():
        torch.testing.assert_close(two.directions[layer], direction, rtol=0, atol=1e-6)
    assert spread.generate(PROMPTS) == whole.generate(PROMPTS)
    with one.at(8.0).on(whole), one.at(8.0).on(spread):
        assert spread.generate(PROMPTS) == whole.generate(PROMPTS)
        torch.testing.assert_close(spread.next_logits(PROMPTS), whole.next_logits(PROMPTS))
