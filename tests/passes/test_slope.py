"""slopes(): one forward-mode pass equals a central difference in float64, on every architecture."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tiny
from conftest import tiny_model
from trimtab.errors import TrimtabError
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.passes import slope as module
from trimtab.passes.slope import Slope, slopes
from trimtab.steering.hooks import steered
from trimtab.steering.vector import VectorSteering

H = 1e-3
SCOPES = ("all", "last", "post_instruction", "generated")


def push(lm: LanguageModel, **more: Any) -> VectorSteering:
    """Two layers at once; random directions, targets for affine."""
    generator = torch.Generator().manual_seed(0)
    directions = {k: torch.randn(lm.d_model, generator=generator) / 6 for k in (1, 2)}
    options: dict[str, Any] = {"alpha": 0.3, "targets": {1: 0.5, 2: -0.4}, **more}
    if options.get("operation", "add") != "add":
        options["alpha"] = 1.0
    return VectorSteering.from_directions(lm, directions, **options)


def prompts(lm: LanguageModel) -> list[Encoded]:
    """Without and with a completion, of different lengths: one of them is padded."""
    return [
        lm.encode("Hello there"),
        lm.encode("How do I find the ferry?", completion="Sure, here"),
    ]


def found(lm: LanguageModel, vector: VectorSteering, at: float = 0.0, **more: Any) -> list[Slope]:
    by_row = dict(slopes(lm, vector, more.get("encoded") or prompts(lm), at))
    return [by_row[i] for i in range(len(by_row))]


@torch.no_grad()
def difference(lm64: LanguageModel, vector: VectorSteering, at: float) -> list[Tensor]:
    """Central differences of every prompt by itself, in float64."""
    result = []
    for item in prompts(lm64):
        (batch,) = lm64.batches([item])
        answer = len(item.ids) - item.prompt_length
        ends = []
        for m in (at - H, at + H):
            with vector.at(m).on(lm64):
                ends.append(lm64.forward(batch, logits_to_keep=answer + 1)[0])
        slope = (ends[1] - ends[0]) / (2 * H)
        result.append(slope[:-1] if answer else slope)
    return result


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_equals_a_central_difference(architecture: str) -> None:
    lm, lm64 = tiny_model(architecture), tiny.language_model(architecture, dtype=torch.float64)
    lm64.model.set_experts_implementation("eager")  # grouped products exist in float32 only
    cases: list[tuple[float, dict[str, Any]]] = [(0.0, {"scope": scope}) for scope in SCOPES]
    cases += [(0.7, {"scope": "all"}), (-0.4, {"scope": "generated"})]
    cases += [(m, {"operation": op}) for op in ("ablate", "affine") for m in (0.0, 0.6)]
    for at, options in cases:
        mine = found(lm, push(lm, **options), at)
        own = difference(lm64, push(lm64, **options), at)
        assert [s.slope.shape[0] for s in mine] == [1, own[1].shape[0]]
        assert {s.method for s in mine} == {"difference" if architecture == "mixtral" else "jvp"}
        for s, expected in zip(mine, own, strict=True):
            error = (s.slope - expected).abs().max()
            assert error <= 5e-3 * expected.abs().max(), (at, options)


def test_generated_is_zero_at_the_first_position_alone(lm: LanguageModel) -> None:
    first, answer = found(lm, push(lm, scope="generated"))
    assert not first.slope.any() and not first.stream_slope.any()
    # The prediction of the answer's first token; that of its second reads a steered token.
    assert not answer.slope[0].any() and answer.slope[1].any()


def test_values_are_those_of_the_model(lm: LanguageModel) -> None:
    vector = push(lm)
    for at in (0.0, 0.7):
        first = found(lm, vector, at)[0]
        with vector.at(at).on(lm):
            own = lm.next_logits("Hello there")
        torch.testing.assert_close(first.logits, own, rtol=1e-4, atol=1e-4)
        assert first.stream.shape == first.stream_slope.shape == (1, lm.d_model)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_alone_equals_in_a_batch(architecture: str) -> None:
    lm = tiny_model(architecture)
    vector = push(lm, scope="post_instruction")
    together = found(lm, vector)
    for item, s in zip(prompts(lm), together, strict=True):
        (alone,) = found(lm, vector, encoded=[item])
        scale = float(alone.slope.abs().max())
        torch.testing.assert_close(s.slope, alone.slope, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(s.logits, alone.logits, rtol=1e-5, atol=1e-5)


def test_the_last_layer_moves_the_stream_by_the_push_itself(llama: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(llama.d_model, generator=generator)
    first = found(llama, VectorSteering.from_directions(llama, {3: c}))[0]
    torch.testing.assert_close(first.stream_slope[0], c, rtol=1e-5, atol=1e-6)


def test_mixtral_falls_back_and_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny.language_model("mixtral", seed=1)
    with caplog.at_level(logging.WARNING):
        methods = {s.method for _ in range(2) for s in found(lm, push(lm))}
    assert methods == {"difference"}
    (record,) = caplog.records
    assert "_grouped_mm" in record.getMessage() and lm.name in record.getMessage()


def test_an_operation_without_a_derivative_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny.language_model("llama")
    vector = push(lm)
    expected = found(lm, vector)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    block = lm.sites.blocks[3]
    inner: Any = block.forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: Opaque.apply(inner(*a, **k)))
    with caplog.at_level(logging.WARNING):
        slow = found(lm, vector)
    assert {s.method for s in slow} == {"difference"} and "forward" in caplog.text
    for mine, own in zip(slow, expected, strict=True):
        assert own.method == "jvp"
        for name in ("slope", "stream_slope", "logits"):
            a, b = getattr(mine, name), getattr(own, name)
            assert (a - b).abs().max() <= 5e-3 * b.abs().max(), name


def test_a_lost_derivative_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny.language_model("llama")
    block = lm.sites.blocks[3]
    inner: Any = block.forward

    def cut(*args: Any, **kwargs: Any) -> Tensor:
        return forward_ad.unpack_dual(inner(*args, **kwargs)).primal

    monkeypatch.setattr(block, "forward", cut)
    with caplog.at_level(logging.WARNING):
        (first, _) = found(lm, push(lm))
    assert first.method == "difference" and first.slope.any()
    assert "lost" in caplog.text


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1e3])
def test_the_difference_needs_no_calibrated_scale(alpha: float) -> None:
    lm = tiny_model("mixtral")
    mine = found(lm, push(lm, alpha=alpha))
    own = found(lm, push(lm, alpha=1.0))
    for a, b in zip(mine, own, strict=True):
        assert (a.slope / alpha - b.slope).abs().max() <= 5e-3 * b.slope.abs().max()


def test_plain_zeros_install_nothing_and_dual_zeros_do(llama: LanguageModel) -> None:
    edits = push(llama).edits()

    def hooks() -> int:
        return sum(len(block._forward_hooks) for block in llama.sites.blocks)

    outside = hooks()  # the library leaves hooks of its own once hidden states were asked for

    def installed(factors: Tensor) -> int:
        with steered(llama, edits, row_factors=factors):
            return hooks() - outside

    assert installed(torch.zeros(2)) == 0
    assert installed(torch.ones(2)) == 2
    with forward_ad.dual_level():
        assert installed(forward_ad.make_dual(torch.zeros(2), torch.ones(2))) == 2
    assert installed(torch.zeros(2, requires_grad=True)) == 2
    assert hooks() == outside


def test_a_scope_that_the_template_lacks_is_refused(plain: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no chat template"):
        found(plain, push(plain, scope="post_instruction"))


def test_what_is_not_finite_is_refused() -> None:
    lm = tiny.language_model("llama")
    nn.init.constant_(lm.model.get_parameter("lm_head.weight"), float("nan"))
    vector = push(lm)
    with pytest.raises(TrimtabError, match="not finite"):
        found(lm, vector)


def test_another_models_vector_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="fingerprint"):
        found(tiny.language_model("llama", seed=5), push(llama))


def test_a_model_without_a_final_norm_is_refused(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "sites", _Without(llama.sites))
    with pytest.raises(TrimtabError, match="final norm"):
        found(llama, push(llama))


class _Without:
    """Sites of a model whose probe found no final norm."""

    final_norm = None

    def __init__(self, sites: Any) -> None:
        self._sites = sites

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sites, name)


def test_the_fallback_is_remembered_for_a_model_and_the_layers_below() -> None:
    lm = tiny.language_model("mixtral", seed=2)
    # Behind the last experts there is nothing that lacks a derivative.
    last = VectorSteering.from_directions(lm, {3: torch.ones(lm.d_model)})
    assert [{s.method for s in found(lm, v)} for v in (push(lm), last)] == [{"difference"}, {"jvp"}]
    assert module._FAILED[lm.model] == 1
