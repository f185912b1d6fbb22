"""Low-rank updates: hooks equal merged weights, on every architecture, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from planted import behavior, merged
from planted import low_rank as update
from trimtab.errors import TrimtabError
from trimtab.levers.conversions.convert import convert
from trimtab.levers.conversions.low_rank_to_vector import outputs_of
from trimtab.levers.lora import all_writers
from trimtab.models.model import LanguageModel
from trimtab.steering.together import Together
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import WeightSteering, writer_of

PROMPTS = ["The ferry leaves the harbor at noon.", "Cats?"]
POST_NORM = ("gemma2", "gemma3", "olmo2")


def test_hooks_equal_merged_weights_and_are_undone(lm: LanguageModel) -> None:
    before, lever = lm.next_logits(PROMPTS), update(lm, m=0.7)
    with lever.on(lm):
        hooked = lm.next_logits(PROMPTS)
    assert (hooked - before).abs().max() > 0.05
    assert torch.equal(lm.next_logits(PROMPTS), before)
    assert torch.allclose(merged(lm, lever).next_logits(PROMPTS), hooked, atol=1e-4)
    assert torch.equal(lm.next_logits(PROMPTS), before)  # merging works on a copy
    with lever.at(0.0).on(lm):
        assert torch.equal(lm.next_logits(PROMPTS), before)


def test_undone_after_an_error(llama: LanguageModel) -> None:
    before = llama.next_logits(PROMPTS)
    with pytest.raises(RuntimeError), update(llama).on(llama):
        raise RuntimeError
    assert torch.equal(llama.next_logits(PROMPTS), before)


def test_a_cache_changes_nothing(llama: LanguageModel) -> None:
    with update(llama).on(llama):
        cached = llama.generate(PROMPTS, max_new_tokens=6)
        assert cached == llama.generate(PROMPTS, max_new_tokens=6, use_cache=False)


def test_experts_and_other_shapes_are_refused_by_name(llama: LanguageModel) -> None:
    mixtral = tiny.language_model("mixtral")
    with pytest.raises(TrimtabError, match="MixtralForCausalLM") as caught:
        writer_of(mixtral, ("mlp", 0))
    assert "attention writer" in caught.value.advice
    assert all(kind == "attention" for kind, _ in all_writers(mixtral))
    wide = WeightSteering({("mlp", 0): torch.ones(32, 1)}, {("mlp", 0): torch.ones(1, 7)})
    with pytest.raises(TrimtabError, match=r"\[32, 7\]"), wide.on(llama):
        pass
    with pytest.raises(TrimtabError, match="do not fit"):
        WeightSteering({("mlp", 0): torch.ones(32, 1)}, {("mlp", 0): torch.ones(2, 48)})
    with pytest.raises(TrimtabError, match="another model"), update(llama).on(mixtral):
        pass


def test_outputs_are_what_the_first_updated_writer_adds() -> None:
    """By a hook that reads the writer's output with and without the update."""
    lm = tiny.language_model("granite")
    lever = update(lm, layers=(1,), m=0.5)
    writer = ("attention", 1)
    seen: list[torch.Tensor] = []
    handle = writer_of(lm, writer).register_forward_hook(lambda m, a, o: seen.append(o[0]))
    encoded = [lm.encode(PROMPTS[0])]
    (batch,) = lm.batches(encoded)
    handle.remove()
    for each in (None, lever):
        # Installed after the lever's own hook, so that it sees what that returned.
        with lever.at(0.0 if each is None else 0.5).on(lm):
            handle = writer_of(lm, writer).register_forward_hook(lambda m, a, o: seen.append(o[0]))
            with torch.no_grad():
                lm.forward(batch)
            handle.remove()
    found = outputs_of(lm, lever, encoded)[writer]
    expected = (seen[1] - seen[0]).double() * lm.sites.residual_multiplier
    assert lm.sites.residual_multiplier != 1
    assert torch.allclose(found, expected, atol=1e-5)


def test_constant_share_by_hand() -> None:
    lm = tiny.language_model("llama")
    lever = update(lm, layers=(1,))
    done: Any = convert(lm, behavior(), lever, "vector", max_new_tokens=4)
    assert len(done.outputs) == 2 and 0 <= done.residual <= 1.5
    for row in done.outputs:
        assert 0 < row.fitted <= 1
        assert row.held_out <= 1 and row.null < row.held_out
    # The mean that is added is the mean of the outputs: over the same texts nothing of it is left.
    texts = [lm.encode(e.prompt) for e in behavior().toward]
    values = outputs_of(lm, lever, texts)[("mlp", 1)]
    share = values.mean(0).square().sum() / values.square().sum(-1).mean()
    centered = 1 - (values - values.mean(0)).square().sum() / values.square().sum()
    assert float(share) == pytest.approx(float(centered))
    names = {vector.site for vector in done.lever.vectors}
    assert names == {"attn_out", "mlp_out"}
    assert done.recovered.effect("after").name == "after"
    assert "constant share" in str(done.table())


def test_a_constant_update_is_recovered_whole() -> None:
    """Where B A x is the same for all tokens, the vector is the update."""
    lm = tiny.language_model("gpt2")
    with torch.no_grad():  # an MLP whose last inner unit is 1 for every token
        block = lm.model.get_submodule("transformer.h.1.mlp")
        block.get_submodule("c_fc").get_parameter("weight")[:, -1] = 0
        block.get_submodule("c_fc").get_parameter("bias")[-1] = 2.0
    unit = torch.zeros(1, 4 * tiny.WIDTH)
    unit[0, -1] = 1.0
    direction = torch.randn(tiny.WIDTH, 1, generator=torch.Generator().manual_seed(1))
    lever = WeightSteering({("mlp", 1): direction}, {("mlp", 1): unit})
    done: Any = convert(lm, behavior(), lever, "vector", max_new_tokens=4)
    assert done.residual == pytest.approx(0, abs=1e-6)
    with lever.on(lm):
        updated = lm.next_logits(PROMPTS)
    with done.lever.on(lm):
        steered = lm.next_logits(PROMPTS)
    assert torch.allclose(updated, steered, atol=1e-4)
    assert (updated - lm.next_logits(PROMPTS)).abs().max() > 0.05


@pytest.mark.parametrize("name", POST_NORM)
def test_no_vector_behind_a_norm(name: str) -> None:
    lm = tiny.language_model(name)
    with pytest.raises(TrimtabError, match="norm between") as caught:
        convert(lm, behavior(), update(lm), "vector")
    assert type(lm.model).__name__ in str(caught.value)


def test_together_is_nested_contexts(llama: LanguageModel) -> None:
    one = VectorSteering.from_directions(llama, {1: torch.ones(tiny.WIDTH)}, 0.5)
    other = VectorSteering.from_directions(
        llama, {2: torch.arange(tiny.WIDTH)}, 1.0, operation="ablate"
    )
    with one.on(llama), other.on(llama):
        nested = llama.next_logits(PROMPTS)
    with Together((one, other)).on(llama):
        assert torch.equal(llama.next_logits(PROMPTS), nested)
    with Together((one, other)).at(0.0).on(llama):
        assert torch.equal(llama.next_logits(PROMPTS), llama.next_logits(PROMPTS))
        assert not torch.equal(llama.next_logits(PROMPTS), nested)
    with pytest.raises(TrimtabError, match="no vectors"):
        Together(())
