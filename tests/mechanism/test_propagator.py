"""The propagator: exact where the network is linear, and equal to differences on every architecture."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

import planted
import tiny
from conftest import tiny_model
from tiny import forward_as
from trimtab.evaluation.readout import gap, readout_tokens
from trimtab.margins.radius import gap_gradients
from trimtab.mechanism.case import Case
from trimtab.mechanism.geometry.jacobian import (
    carried,
    courses,
    depth_name,
    moved_gaps,
    pulled_back,
    secant,
)
from trimtab.mechanism.geometry.propagator import SKIP_PATH, propagator
from trimtab.models.hooking import input_tensor
from trimtab.models.model import LanguageModel
from trimtab.passes.slope import slopes
from trimtab.steering.vector import VectorSteering

BEHAVIOR = planted.behavior(readout={"toward": ["Z", "Kite"], "away": ["Q"]})
TEXTS = ["Hello there", "How do I find the ferry at noon?"]
H = 1e-4


def vector(lm: LanguageModel, alpha: float = 0.5, layers: tuple[int, ...] = (0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(3)
    drawn = {k: torch.randn(lm.d_model, generator=generator) for k in layers}
    return VectorSteering.from_directions(lm, drawn, alpha=alpha)


def pushes_for(course, copies: int = 2) -> Tensor:
    """Different at every position; nothing on padding."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(copies, *course.entry.shape, generator=generator).to(course.entry)
    return drawn * course.real


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_derivative_equals_a_central_difference(architecture: str) -> None:
    lm, lm64 = tiny_model(architecture), tiny.language_model(architecture, dtype=torch.float64)
    lm64.model.set_experts_implementation("eager")  # grouped products exist in float32 only
    encoded = [lm.encode(text) for text in TEXTS]
    (course,) = courses(lm, encoded)
    for depth in (0, 1, 3):
        pushes = pushes_for(course)
        found, method = carried(lm, course, depth, pushes)
        assert method == ("difference" if architecture == "mixtral" else "jvp")
        assert len(found) == lm.n_layers + 1 - depth
        # At its own depth nothing happened yet.
        torch.testing.assert_close(found[0], pushes[:, :, -1], rtol=0, atol=1e-3)
        for place, row in enumerate(course.batch.rows.tolist()):
            (alone,) = courses(lm64, [encoded[row]])
            own = pushes[:, place : place + 1, -alone.entry.shape[1] :].double()
            ends = [secant(lm64, alone, depth, sign * H * own) for sign in (1, -1)]
            for mine, ahead, behind in zip(found, *ends, strict=True):
                expected = (ahead - behind)[:, 0] / (2 * H)
                error = (mine[:, place] - expected).abs().max()
                assert error <= 5e-3 * expected.abs().max(), depth


def test_backward_is_the_transpose_of_forward(lm: LanguageModel) -> None:
    """g_L . (J v) = sum over positions of g_l,p . v_p, and g is what gap_gradients finds."""
    tokens = readout_tokens(lm, BEHAVIOR)
    encoded = [lm.encode(text) for text in TEXTS]
    (course,) = courses(lm, encoded)
    gradients = pulled_back(lm, tokens, course.batch)
    other = gap_gradients(lm, tokens, encoded)
    rows = course.batch.rows
    for layer in range(lm.n_layers):
        torch.testing.assert_close(gradients[layer + 1][:, -1], other.grad[rows, layer])
    for depth in (0, 2):
        pushes = pushes_for(course)
        arrived = carried(lm, course, depth, pushes)[0][-1]
        forward = (arrived * gradients[-1][:, -1]).sum(-1)
        backward = (pushes * gradients[depth]).sum((-1, -2))
        scale = float(backward.abs().max())
        torch.testing.assert_close(forward, backward, rtol=0, atol=6e-3 * scale)


def test_without_attention_nothing_leaves_its_position(lm: LanguageModel) -> None:
    tokens = readout_tokens(lm, BEHAVIOR)
    (course,) = courses(lm, [lm.encode(text) for text in TEXTS])
    held = pulled_back(lm, tokens, course.batch, attention=False)
    whole = pulled_back(lm, tokens, course.batch)
    assert not held[0][:, :-1].any() and held[0][:, -1].any()
    assert whole[0][:, :-1].abs().max() > 0
    torch.testing.assert_close(held[-1], whole[-1])  # above the last block nothing is left to hold


def test_it_agrees_with_the_slope_of_a_steering(llama: LanguageModel) -> None:
    encoded = [llama.encode(TEXTS[1])]
    (course,) = courses(llama, encoded)
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(llama.d_model, generator=generator)
    for scope in ("all", "last"):
        steering = VectorSteering.from_directions(llama, {1: c}, scope=scope)
        ((_, slope),) = slopes(llama, steering, encoded)
        pushes = torch.zeros(1, *course.entry.shape)
        pushes[:, :, slice(None) if scope == "all" else slice(-1, None)] = c
        found = carried(llama, course, 2, pushes)[0][-1][0, 0]
        torch.testing.assert_close(found, slope.stream_slope[0], rtol=1e-4, atol=1e-5)


def test_alone_equals_in_a_batch_and_real_pushes_are_the_model_s_own(llama: LanguageModel) -> None:
    tokens = readout_tokens(llama, BEHAVIOR)
    (course,) = courses(llama, [llama.encode(text) for text in TEXTS])
    at = course.batch.rows.tolist().index(0)  # the shorter one, padded
    (alone,) = courses(llama, [llama.encode(TEXTS[0])])
    width = alone.entry.shape[1]
    pushes = pushes_for(course)
    together = carried(llama, course, 1, pushes)[0][-1][:, at]
    single = carried(llama, alone, 1, pushes[:, at : at + 1, -width:])[0][-1][:, 0]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)
    c = vector(llama, alpha=2.0, layers=(1,))
    push = 2.0 * vector(llama, alpha=1.0, layers=(1,)).scales[1] * c.directions[1]
    everywhere = push.expand(1, *course.entry.shape) * course.real
    with c.on(llama):
        expected = gap(llama, BEHAVIOR, TEXTS).double()
    found = moved_gaps(llama, tokens, course, 2, everywhere)[0]
    torch.testing.assert_close(found, expected[course.batch.rows], rtol=1e-4, atol=1e-4)


@contextmanager
def linear(lm: LanguageModel, block: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let every block be one linear map of the stream."""

    def forward(*args: object, **kwargs: object) -> Tensor:
        hidden = input_tensor(args, kwargs)
        assert hidden is not None
        return block(hidden)

    assert lm.sites  # found before the blocks change
    with ExitStack() as stack:
        for module in lm.sites.blocks:
            stack.enter_context(forward_as(module, forward))
        yield


def test_a_linear_network_is_known_exactly() -> None:
    """h_p -> A h_p + B (sum of the h before p): J_TT = A^k, J_Tp by the recursion on columns."""
    lm = tiny.language_model("llama")
    generator = torch.Generator().manual_seed(2)
    d = lm.d_model
    a = torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator)
    b = 0.05 * torch.randn(d, d, generator=generator)

    def block(h: Tensor) -> Tensor:
        return h @ a.T + (h.cumsum(1) - h) @ b.T

    encoded = [lm.encode(text) for text in ("the cats", "the pier", "the noon", "a b")]
    encoded = [one for one in encoded if len(one.ids) == len(encoded[0].ids)]
    assert len(encoded) >= 2  # no padding: a linear block cannot tell it from tokens
    steering, depth = vector(lm), 2
    with linear(lm, block):
        report = propagator(Case(lm, BEHAVIOR, steering), encoded, probes=60)
    layer = report.layers[depth]
    assert layer.site == depth_name(depth) == "resid_post.1"
    same = torch.linalg.matrix_power(a, lm.n_layers - depth)
    # What a push at all positions does at the last one: the columns' recursion.
    length = len(encoded[0].ids)
    ones = torch.eye(d).expand(length, d, d).clone()
    for _ in range(lm.n_layers - depth):
        ones = torch.einsum("ij,pjk->pik", a, ones) + torch.einsum(
            "ij,pjk->pik", b, ones.cumsum(0) - ones
        )
    everywhere = ones[-1]
    v = steering.directions[1]
    parts = {"same": same, "broadcast": everywhere, "cross": everywhere - same}
    for kind, matrix in parts.items():
        moved, one = matrix @ v, layer.vector[kind]
        assert one.gain.mean == pytest.approx(float(moved.norm()), rel=1e-4)
        assert one.cosine.mean == pytest.approx(float(moved @ v / moved.norm()), abs=1e-4)
        assert one.departure.mean == pytest.approx(float((moved - v).norm()), rel=1e-4)
    for kind in ("same", "broadcast"):  # linear: the secant is the derivative
        assert layer.secant[kind].gain.mean == pytest.approx(layer.vector[kind].gain.mean, rel=1e-3)
    near = layer.one_block["vector"].gain.mean
    assert near == pytest.approx(float((a @ v).norm()), rel=1e-4)
    for found, matrix in (
        (layer.same_frobenius, same - torch.eye(d)),
        (layer.cross_frobenius, everywhere - same),
    ):
        expected = float(matrix.norm()) / d**0.5
        assert found.value == pytest.approx(expected, rel=0.08) and found.value != expected
        assert 0 < found.error < 0.2 * found.value
    assert not layer.secant["same"].gain.mean == pytest.approx(1.0, rel=1e-2)


def test_identity_is_found_where_it_holds() -> None:
    lm = tiny.language_model("llama", seed=4)
    with torch.no_grad():
        for attention, mlp in zip(lm.sites.attention_writer, lm.sites.mlp_writer, strict=True):
            assert attention is not None and mlp is not None
            attention.get_parameter("weight").zero_()
            mlp.get_parameter("weight").zero_()
    encoded = [lm.encode(text) for text in TEXTS]
    report = propagator(Case(lm, BEHAVIOR, vector(lm)), encoded, probes=2)
    for layer in report.layers:
        assert layer.same_frobenius.value == pytest.approx(0, abs=1e-6)
        assert layer.cross_frobenius.value == pytest.approx(0, abs=1e-6)
        assert layer.backward_cosine.mean == pytest.approx(1) == layer.backward_gain.mean
        assert layer.growth.mean == pytest.approx(1)
        for one in (*layer.vector.values(), *layer.random.values()):
            crossed = one.gain.mean < 0.5
            assert one.gain.mean == pytest.approx(0 if crossed else 1, abs=1e-6)
        if layer.vector:
            assert layer.vector["same"].departure.mean == pytest.approx(0, abs=1e-6)
            assert layer.vector["cross"].gain.mean == pytest.approx(0, abs=1e-6)


def test_the_report_on_every_architecture(lm: LanguageModel) -> None:
    encoded = [lm.encode(text) for text in TEXTS]
    report = propagator(Case(lm, BEHAVIOR, vector(lm)), encoded, probes=3)
    assert [layer.site for layer in report.layers] == [depth_name(k) for k in range(lm.n_layers)]
    assert report.layers[0].site == "embed.0" and not report.layers[0].vector
    assert report.layers[1].vector["same"].gain.mean > 0
    for layer in report.layers:
        # The probes are the random directions: E |Jz - z|^2 over them is the squared norm.
        departure = layer.random["same"].departure.mean
        assert departure <= layer.same_frobenius.value * (1 + 1e-6)
        assert departure >= 0.7 * layer.same_frobenius.value
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["note"] == SKIP_PATH
    assert all(SKIP_PATH in table.notes for table in report.tables()[1:2])
    again = propagator(Case(lm, BEHAVIOR, vector(lm)), encoded, probes=3)
    assert again.to_dict() == report.to_dict()


def test_it_falls_back_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny.language_model("mixtral", seed=1)
    with caplog.at_level(logging.WARNING):
        report = propagator(Case(lm, BEHAVIOR, vector(lm)), [lm.encode("Hello")], probes=1)
    assert report.method == "difference"
    said = [record.getMessage() for record in caplog.records]
    assert 1 <= len(said) <= lm.n_layers and all(lm.name in text for text in said)
