"""Compiled models are steered as plain ones are, whichever call comes first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import trimtab as tt
from tiny import config, language_model
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.passes.rollout import rollout

PROMPTS = ["How do I borrow the rowboat?"]


def made() -> LanguageModel:
    """Two layers: tracing takes its time."""
    shape = config("llama")
    shape.num_hidden_layers = 2
    return language_model(shape)


def whole(lm: LanguageModel) -> LanguageModel:
    lm.model.compile(backend="eager")
    return lm


def by_layer(lm: LanguageModel) -> LanguageModel:
    for block in lm.sites.blocks:
        block.compile(backend="eager")
    return lm


def wrapped(lm: LanguageModel) -> LanguageModel:
    compiled = torch.compile(lm.model, backend="eager")
    return LanguageModel(compiled, lm.tokenizer, lm.name)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiled", "site"), [(whole, "resid_post"), (by_layer, "attn_out"), (wrapped, "attn_out")]
)
@pytest.mark.parametrize("steered_first", [False, True])
def test_the_hooks_logits_and_answers(
    compiled: Callable[[LanguageModel], LanguageModel], steered_first: bool, site: str
) -> None:
    plain = made()
    c = torch.linspace(-1, 1, plain.d_model)
    vector = tt.VectorSteering.from_directions(plain, {1: c}, alpha=3.0, site=site)

    def results(lm: LanguageModel) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        read = capture(lm, [lm.encode(p) for p in PROMPTS], [1])
        return lm.next_logits(PROMPTS), lm.generate(PROMPTS, max_new_tokens=2), read

    with vector.on(plain):
        expected_steered = results(plain)
    expected = results(plain)
    assert not torch.equal(expected[0], expected_steered[0])
    lm = compiled(made())
    for steered in (steered_first, not steered_first):
        if steered:
            with vector.on(lm):
                found = results(lm)
        else:
            found = results(lm)
        wanted = expected_steered if steered else expected
        torch.testing.assert_close(found[0], wanted[0])
        assert found[1] == wanted[1]
        torch.testing.assert_close(found[2], wanted[2])
    # What tune and measure answer with: several strengths in shared passes.
    many = [rollout(each, vector, PROMPTS, [0.0, 1.0], max_new_tokens=2) for each in (lm, plain)]
    assert many[0] == many[1]
    assert many[0] == [expected[1], expected_steered[1]]


def test_a_compiled_function_of_ones_own_is_steered_too() -> None:
    lm = made()
    ids = torch.tensor([lm.encode("Hello").ids])
    vector = tt.VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)}, alpha=3.0)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return lm.model(input_ids=ids, use_cache=False).logits

    compiled = torch.compile(logits, backend="eager")
    with torch.no_grad():
        plain = compiled(ids)
        with vector.on(lm):
            torch.testing.assert_close(compiled(ids), logits(ids))
            assert not torch.allclose(compiled(ids), plain)
        torch.testing.assert_close(compiled(ids), plain)


def test_a_block_that_could_not_be_opened_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside compiled code no block can be opened; those after it must still be eager."""
    lm = made()
    vector = tt.VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)}, alpha=3.0)
    ids = torch.tensor([lm.encode("Hello").ids])
    compiled = torch.compile(lm.model, backend="eager")

    def refuse(stance: str) -> None:
        raise RuntimeError("attempted to set_stance in a torch.compile region")

    with torch.no_grad():
        plain = compiled(input_ids=ids, use_cache=False).logits
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="set_stance"):
            patch.setattr(torch.compiler, "set_stance", refuse)
            with vector.on(lm):
                pass
        with vector.on(lm):
            steered = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(steered, lm.model(input_ids=ids, use_cache=False).logits)
        assert not torch.allclose(steered, plain)
