"""Value vectors: what heads really write for a push, and their reading against random ones."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import planted
from trimtab.errors import TrimtabError
from trimtab.evaluation.readout import readout_tokens
from trimtab.mechanism.case import Case
from trimtab.mechanism.frozen.holding import push_before
from trimtab.mechanism.reading.head_values import head_scales, head_values, reading_layers
from trimtab.mechanism.reading.lens import LensReading
from trimtab.mechanism.reading.value_vector import value_vectors
from trimtab.models.attention import AttentionCall, attending
from trimtab.models.heads import heads_of
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import read_norm
from trimtab.steering.vector import VectorSteering

PROMPTS = ["How do I find the pier?", "Please talk only about cats and the ferry."]
WORDS = {"toward": ["Z", "Kite"], "away": ["Q"]}


def vector_for(lm: LanguageModel, layers: tuple[int, ...] = (1,), scope: str = "all"):
    generator = torch.Generator().manual_seed(3)
    directions = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    return VectorSteering.from_directions(lm, directions, alpha=0.6, scope=scope)


def mixed_heads(
    lm: LanguageModel, vector: VectorSteering, layer: int, without: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the output projection, steered, patterns fixed; real tokens; 1 / size of h.

    Args:
        lm: the model.
        vector: the steering.
        layer: whose heads.
        without: a summand of the stream whose share is taken out of what attention reads, at the
            stream's own size.
    """
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    found, patterns, seen = heads_of(lm)[layer], list[Tensor](), dict[str, Tensor]()
    form = None if found.norm is None else read_norm(found.norm, lm.d_model, "a norm")

    def keep(call: AttentionCall) -> None:
        if call.layer == layer:
            patterns.append(call.probabilities())

    def fixed(call: AttentionCall) -> Tensor | None:
        return call.mix(patterns[0]) if call.layer == layer else None

    def reduced(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stream = args[0] if args else kwargs["hidden_states"]
        if without is not None:
            stream = stream - without
        return (stream, *args[1:]) if args else args, {**kwargs, "hidden_states": stream}

    def normed(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen["stream"] = args[0]
        assert form is not None
        return output if without is None else output - form.direct(without, args[0])

    with torch.no_grad(), vector.on(lm):
        with attending(lm, keep):
            lm.forward(batch)
        with ExitStack() as stack:
            if found.norm is None:
                hook = lm.sites.attention[layer].register_forward_pre_hook(
                    reduced, with_kwargs=True
                )
            else:
                hook = found.norm.register_forward_hook(normed)
            stack.callback(hook.remove)
            out = found.output.register_forward_pre_hook(lambda m, args: seen.update(mixed=args[0]))
            stack.callback(out.remove)
            stack.enter_context(attending(lm, fixed))
            lm.forward(batch)
    rows = batch.attention_mask.bool()
    if form is None:
        return seen["mixed"], rows, torch.ones(rows.shape)
    values = form.center(seen["stream"])
    return seen["mixed"], rows, (values.square().mean(-1) + form.eps).rsqrt()


@torch.no_grad()
def test_the_direct_effect_on_every_head_is_proportional(lm: LanguageModel) -> None:
    """Through the model's own modules, on real prompts: cosine 1, a positive factor."""
    vector, layer = vector_for(lm), 2
    push = push_before(lm, vector, layer, "attention")
    found = heads_of(lm)[layer]
    whole, rows, sizes = mixed_heads(lm, vector, layer, None)
    without, _, _ = mixed_heads(lm, vector, layer, push)
    firsts = (rows.long().cumsum(1) == 1) & rows  # these attend to themselves alone
    effect = (whole - without).unflatten(-1, (found.n_heads, found.head_dim))
    said = head_values(lm, layer, push)
    assert said.shape == (found.n_heads, lm.d_model)
    nothing = found.output(torch.zeros_like(whole))
    for head in range(found.n_heads):
        alone = torch.zeros_like(effect)
        alone[:, :, head] = effect[:, :, head]
        written = (found.output(alone.flatten(2)) - nothing) * lm.sites.residual_multiplier
        if found.attention_post is not None:
            form = read_norm(found.attention_post, lm.d_model, "a norm")
            written = form.center(written) * form.gain.float()
        cosines = torch.cosine_similarity(written[rows], said[head][None], dim=-1)
        assert float(cosines.min()) > 0.9999
        exactly = sizes[firsts][:, None] * said[head]
        torch.testing.assert_close(written[firsts], exactly, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_head_values_are_linear_and_without_biases(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, lm.d_model, generator=generator)
    both = head_values(lm, 1, a - 2 * b)
    torch.testing.assert_close(
        both, head_values(lm, 1, a) - 2 * head_values(lm, 1, b), rtol=1e-4, atol=1e-4
    )
    assert not bool(head_values(lm, 1, torch.zeros(lm.d_model)).any())


@torch.no_grad()
def test_scales_are_the_sizes_that_norms_divide_by(lm: LanguageModel) -> None:
    vector, layer = vector_for(lm), 2
    scales = head_scales(lm, vector, PROMPTS, max_new_tokens=0)
    assert set(scales) == set(reading_layers(lm, vector)) == {2, 3}
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    rows, wanted = batch.attention_mask.bool(), 1.0
    found = heads_of(lm)[layer]
    for norm, last in ((found.norm, False), (found.attention_post, True)):
        if norm is None:
            continue
        form, seen = read_norm(norm, lm.d_model, "a norm"), dict[str, Tensor]()
        handle = norm.register_forward_hook(lambda m, a, out, s=seen: s.update(h=a[0], out=out))
        with vector.on(lm):
            lm.forward(batch)
        handle.remove()
        # As the module itself shows it: what it returns over what it would at size 1.
        sizes = (seen["out"] - form.shift.float()).norm(dim=-1)
        sizes = sizes / (form.center(seen["h"]) * form.gain.float()).norm(dim=-1)
        wanted *= float(sizes[:, -1].mean() if last else sizes[rows].mean())
    assert scales[layer] == pytest.approx(wanted, rel=1e-3)


def test_scopes_and_sites_tell_where_heads_read(llama: LanguageModel) -> None:
    assert reading_layers(llama, vector_for(llama, (0, 2))) == [1, 2, 3]
    before = vector_for(llama, (1,)).select(site="resid_pre")
    assert reading_layers(llama, before) == [1, 2, 3]
    scales = [
        head_scales(llama, vector_for(llama, (1,), scope), PROMPTS)[2]
        for scope in ("all", "post_instruction", "generated")
    ]
    assert len({round(scale, 6) for scale in scales}) == 3 and min(scales) > 0


def test_reading_against_the_unembedding_by_hand() -> None:
    lm = planted.language_model()
    behavior = planted.behavior(readout=WORDS)
    vector = planted.push(lm).select(layers=(0,)).at(1.0)
    found = value_vectors(Case(lm, behavior, vector), split=None, top=5, randoms=40)
    scales = head_scales(lm, vector, [e.prompt for e in behavior.away])
    assert found.scales == pytest.approx(scales)
    weight = lm.model.get_parameter("lm_head.weight").detach()[: len(lm.tokenizer)]
    gain = lm.model.get_parameter("model.norm.weight").detach()
    tokens = readout_tokens(lm, behavior)

    def by_hand(values: Tensor) -> tuple[list[str], float]:
        said = weight @ (values * gain)
        gap = said[list(tokens.toward)].mean() - said[list(tokens.away)].mean()
        texts = [str(lm.tokenizer.decode([i])) for i in said.topk(5).indices.tolist()]
        return texts, float(gap / said.std(correction=0))

    push = vector.alphas[0] * vector.directions[0]
    total = torch.zeros(lm.d_model)
    for layer in (1, 2, 3):
        each = head_values(lm, layer, push) * scales[layer]
        total += each.sum(0)
        for head, one in enumerate(each):
            match(reading(found.heads, (layer, head)), one, *by_hand(one))
    match(found.own, push, *by_hand(push))
    match(found.total, total, *by_hand(total))
    assert len(found.heads) == 12 and found.leading is None
    lengths = [head.length for head in found.heads]
    assert lengths == sorted(lengths, reverse=True)


def reading(heads: tuple[LensReading, ...], place: tuple[int, int]) -> LensReading:
    return next(head for head in heads if head.place == place)


def match(found: LensReading, vector: Tensor, texts: list[str], score: float) -> None:
    assert found.length == pytest.approx(float(vector.norm()), rel=1e-4)
    assert list(found.promoted) == texts and len(found.suppressed) == 5
    assert found.score == pytest.approx(score, rel=1e-3, abs=1e-4)


def test_a_planted_direction_reads_as_itself_and_random_ones_do_not() -> None:
    lm = planted.language_model()
    vector = planted.push(lm).select(layers=(0,)).at(1.0)
    z_minus_q = VectorSteering.from_directions(lm, {0: planted.push(lm).directions[3]}, alpha=1.0)
    behavior = planted.behavior(readout={"toward": ["Z"], "away": ["Q"]})
    found = value_vectors(Case(lm, behavior, z_minus_q), split=None, randoms=60)
    own = found.own
    assert own.score is not None and own.null_high is not None and own.null_low is not None
    assert own.score > own.null_high > 0 > own.null_low and own.p == pytest.approx(1 / 61)
    assert own.promoted[0].strip() == "Z"
    away = value_vectors(Case(lm, behavior, z_minus_q.at(-1.0)), split=None, randoms=60).own
    assert away.promoted == own.suppressed and away.score == pytest.approx(-own.score)
    other = value_vectors(Case(lm, behavior, vector), split=None, randoms=60).own
    assert other.p is not None and other.p > 0.05
    assert found.telling is not None and found.telling_high is not None
    assert 0 <= found.telling <= found.telling_high <= 1


def test_ranking_orders_heads_and_sums_the_leading_ones(llama: LanguageModel, tmp_path) -> None:
    behavior, vector = planted.behavior(readout=WORDS), vector_for(llama)
    ranking = {(3, 1): -5.0, (2, 0): 2.0, (2, 2): 0.5}
    found = value_vectors(Case(llama, behavior, vector), ranking, split=None, randoms=20)
    assert [head.place for head in found.heads[:3]] == [(3, 1), (2, 0), (2, 2)]
    assert found.heads[0].attribution == -5.0 and found.heads[3].attribution == 0.0
    assert found.leading is not None and found.leading.length == pytest.approx(
        found.heads[0].length
    )
    assert "head 3.1" in str(found) and "random" in str(found)
    assert found.save(tmp_path / "v.json").exists()


def test_every_architecture_is_read(lm: LanguageModel) -> None:
    found = value_vectors(Case(lm, planted.behavior(), vector_for(lm)), split=None, randoms=20)
    assert found.own.score is None and found.telling is None and found.toward == ()
    assert len(found.heads) == 8 and all(len(head.promoted) == 20 for head in found.heads)
    assert "none" in str(found)


def test_refusals(llama: LanguageModel) -> None:
    behavior = planted.behavior(readout=WORDS)
    with pytest.raises(TrimtabError, match="operation affine"):
        value_vectors(
            Case(llama, behavior, vector_for(llama).select(operation="affine")), split=None
        )
    with pytest.raises(TrimtabError, match="no attention that reads"):
        value_vectors(Case(llama, behavior, vector_for(llama, (3,))), split=None)
    with pytest.raises(TrimtabError, match="strength 0"):
        value_vectors(Case(llama, behavior, vector_for(llama).at(0.0)), split=None)
