"""The closed form of the last steps: equal to the model's own logits, along rays and at infinity."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from conftest import tiny_model
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.passes.head import collapse_logits, read_head
from trimtab.passes.slope import final_stream, slopes
from trimtab.steering.vector import VectorSteering

PROMPTS = ["Hello there", "How do I find the ferry?", "Where is the pier?"]
FAR = 1e5


def direction(lm: LanguageModel, seed: int = 0) -> Tensor:
    return torch.randn(lm.d_model, generator=torch.Generator().manual_seed(seed))


def push(lm: LanguageModel, layers: tuple[int, ...], **more: Any) -> VectorSteering:
    return VectorSteering.from_directions(lm, {k: direction(lm, k) for k in layers}, **more)


@torch.no_grad()
def streams(lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """What enters the final norm, and the logits, at every token of a prompt."""
    (batch,) = lm.batches([lm.encode(PROMPTS[1])])
    with final_stream(lm) as seen:
        logits = lm.forward(batch)
    return seen[-1][0], logits[0]


def test_it_equals_the_models_own_logits(lm: LanguageModel) -> None:
    stream, logits = streams(lm)
    mine = read_head(lm).logits(stream)
    assert mine.dtype == torch.float64 and mine.shape == logits.shape
    assert (mine - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_what_was_read_of_each_architecture(lm: LanguageModel) -> None:
    head, kind = read_head(lm), lm.name.removeprefix("tiny-")
    assert head.centered == (kind in ("gpt2", "gpt_neox"))
    assert head.cap == (30.0 if kind == "gemma2" else None)
    assert head.scale == (2.0 if kind == "granite" else 1.0)
    assert bool(head.constant.any()) == (kind in ("gpt2", "gpt_neox"))  # the norm's shift


def test_a_ray_equals_the_hooked_model_at_the_last_layer(lm: LanguageModel) -> None:
    vector = push(lm, (3,))
    found = dict(slopes(lm, vector, [lm.encode(p) for p in PROMPTS]))
    stream = torch.cat([found[i].stream for i in range(3)])
    head = read_head(lm)
    for alpha in (-300.0, -10.0, -0.7, 0.0, 0.3, 2.0, 40.0, 1000.0):
        with vector.at(alpha).on(lm):
            own = lm.next_logits(PROMPTS)
        mine = head.along(stream, direction(lm, 3), alpha)
        assert (mine - own).abs().max() <= 1e-5 * own.abs().max(), alpha


def test_every_row_may_have_its_own_alpha_and_push(llama: LanguageModel) -> None:
    stream, _ = streams(llama)
    head, pushes = read_head(llama), torch.stack([direction(llama, k) for k in range(3)])
    alphas = torch.tensor([0.5, -2.0, 7.0])
    together = head.along(stream[:3], pushes, alphas)
    for i in range(3):
        alone = head.along(stream[i : i + 1], pushes[i], float(alphas[i]))
        torch.testing.assert_close(together[i], alone[0])
        moved = head.logits(stream[i : i + 1].double() + float(alphas[i]) * pushes[i].double())
        torch.testing.assert_close(alone, moved)


def test_the_limit_is_that_of_the_ray(lm: LanguageModel) -> None:
    head, c = read_head(lm), direction(lm)
    stream = streams(lm)[0][:2]
    for sign in (1, -1):
        far = head.along(stream, c, sign * 1e9)
        limit = head.limit(c, sign).expand_as(far)
        assert (far - limit).abs().max() <= 1e-6 * limit.abs().max()


@pytest.mark.parametrize("layers", [(3,), (0,), (0, 1, 2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_collapse_token_is_the_one_of_a_real_pass(
    lm: LanguageModel, layers: tuple[int, ...], sign: int
) -> None:
    vector = push(lm, layers)
    predicted = collapse_logits(lm, vector, sign)
    with vector.at(sign * FAR).on(lm):
        far = lm.next_logits(PROMPTS)
    assert far.argmax(-1).tolist() == [int(predicted.argmax())] * 3
    # The whole plateau, not its top alone; earlier blocks add what is 1e5 times smaller.
    assert (far - predicted).abs().max() <= 2e-3 * predicted.abs().max()


@pytest.mark.parametrize("site", ["embed", "resid_pre", "resid_mid"])
def test_other_sites_of_the_stream_collapse_alike(site: str) -> None:
    lm = tiny_model("granite")
    vector = push(lm, (0,), site=site)
    with vector.at(FAR).on(lm):
        far = lm.next_logits(PROMPTS)
    assert far.argmax(-1).tolist() == [int(collapse_logits(lm, vector).argmax())] * 3


def test_layers_count_by_their_raw_push(llama: LanguageModel) -> None:
    both = push(llama, (1, 3))
    alone = {k: int(collapse_logits(llama, both.select(layers=(k,))).argmax()) for k in (1, 3)}
    assert alone[1] != alone[3]
    scaled = VectorSteering.from_directions(
        llama, {1: direction(llama, 1), 3: 100 * direction(llama, 3)}
    )
    assert int(collapse_logits(llama, scaled).argmax()) == alone[3]


@pytest.mark.parametrize("more", [{"operation": "ablate"}, {"operation": "affine"}])
def test_what_does_not_grow_is_refused_by_name(llama: LanguageModel, more: dict[str, Any]) -> None:
    with pytest.raises(TrimtabError, match=f"{more['operation']} at resid_post"):
        collapse_logits(llama, push(llama, (1,), **more))


def test_a_push_into_a_sublayer_is_refused_by_name(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="mlp_out"):
        collapse_logits(llama, push(llama, (1,), site="mlp_out"))


def test_pushes_that_cancel_are_refused() -> None:
    lm = tiny_model("gpt2")
    c = direction(lm)
    opposed = VectorSteering.from_directions(lm, {1: c, 2: -c})
    with pytest.raises(TrimtabError, match="cancel"):
        collapse_logits(lm, opposed)
    # A LayerNorm leaves nothing of a push along the ones; an RMS norm does.
    ones = torch.ones(lm.d_model)
    with pytest.raises(TrimtabError, match="mean"):
        collapse_logits(lm, VectorSteering.from_directions(lm, {3: ones}))
    llama = tiny_model("llama")
    collapse_logits(llama, VectorSteering.from_directions(llama, {3: ones}))


def test_a_norm_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    norm: Any = lm.sites.final_norm
    monkeypatch.setattr(norm, "forward", lambda x: torch.tanh(x))
    with pytest.raises(TrimtabError, match="neither RMS nor LayerNorm"):
        read_head(lm)


def test_logits_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    unembedding: Any = lm.sites.unembedding
    inner = unembedding.forward
    monkeypatch.setattr(unembedding, "forward", lambda x: inner(x).clamp_min(0))
    with pytest.raises(TrimtabError, match="scale and cap"):
        read_head(lm)


def test_an_unembedding_with_a_bias_counts() -> None:
    lm = tiny.language_model("granite")  # its logits are scaled, the bias with them
    unembedding: Any = lm.sites.unembedding
    unembedding.bias = nn.Parameter(torch.randn(unembedding.weight.shape[0]))
    stream, logits = streams(lm)
    assert (read_head(lm).logits(stream) - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_half_precision_is_read_to_its_own_accuracy() -> None:
    lm = tiny.language_model("gemma2", dtype=torch.bfloat16)
    stream, logits = streams(lm)
    mine = read_head(lm).logits(stream.float())
    assert (mine - logits.float()).abs().max() <= 3e-2 * logits.float().abs().max()
