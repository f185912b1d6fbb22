"""Frozen runs: exact where nothing can change, and equal to sublayers patched by hand elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import planted
import trimtab as tt
from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case
from trimtab.mechanism.frozen.freeze import _FreezeRun, _row, freeze_table
from trimtab.mechanism.frozen.holding import HOLDS, _Held, holding, push_before
from trimtab.mechanism.frozen.lanes import lane_answers
from trimtab.models.attention import AttentionCall, attending
from trimtab.models.batch import Batch
from trimtab.models.heads import heads_of
from trimtab.models.model import LanguageModel
from trimtab.models.norm_form import read_norm
from trimtab.models.sites import KINDS
from trimtab.passes.sharing import spread
from trimtab.steering.vector import VectorSteering


@pytest.fixture(scope="module")
def harbor() -> LanguageModel:
    return tt.load("harbor", dtype=torch.float32)


PROMPTS = ["How do I find the pier?", "Why?", "Please talk only about cats and the ferry."]
ALL = [*HOLDS, "qk+ov", "ov+mlp"]
SCOPES = ("all", "last", "prompt", "post_instruction", "generated", "[2,6)")


def vector_for(
    lm: LanguageModel,
    layers: tuple[int, ...] = (1, 2),
    site: str = "resid_post",
    scope: str = "all",
) -> VectorSteering:
    generator = torch.Generator().manual_seed(3)
    directions = {layer: torch.randn(lm.d_model, generator=generator) for layer in layers}
    return VectorSteering.from_directions(lm, directions, alpha=0.6, site=site, scope=scope)


def batch_of(lm: LanguageModel):
    (batch,) = lm.batches([lm.encode(prompt) for prompt in PROMPTS])
    return batch


def steered_logits(lm: LanguageModel, vector: VectorSteering) -> Tensor:
    with torch.no_grad(), vector.on(lm):
        return lm.forward(batch_of(lm))


def real(lm: LanguageModel, logits: Tensor) -> Tensor:
    return logits[batch_of(lm).attention_mask.bool()]


@torch.no_grad()
def lane_logits(
    lm: LanguageModel,
    vector: VectorSteering,
    batch: Batch,
    holds: Sequence[str] = (),
    factors: tuple[float, float] = (0.0, 1.0),
    null_seed: int | None = None,
) -> Tensor:
    """Read fixed tokens in both lanes and return the second lane's logits."""
    each = torch.tensor(factors).repeat_interleave(len(batch.rows))
    with holding(lm, vector, holds, each, null_seed):
        return lm.forward(spread(batch, 2)).chunk(2)[1]


def close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max().clamp_min(1))


def test_lanes_are_the_steered_run(lm: LanguageModel) -> None:
    vector = vector_for(lm)
    wanted = steered_logits(lm, vector)
    base = lm.forward(batch_of(lm))
    assert not close(real(lm, wanted), real(lm, base))
    assert close(real(lm, lane_logits(lm, vector, batch_of(lm))), real(lm, wanted))
    with vector.on(lm):
        answers = lm.generate(PROMPTS, max_new_tokens=10)
    assert answers != lm.generate(PROMPTS, max_new_tokens=10)
    assert lane_answers(lm, vector, PROMPTS, max_new_tokens=10) == answers


def test_own_activations_and_strength_zero_change_nothing(lm: LanguageModel) -> None:
    vector = vector_for(lm)
    steered, base = steered_logits(lm, vector), lm.forward(batch_of(lm))
    for hold in ALL:
        own = lane_logits(lm, vector, batch_of(lm), [hold], factors=(1.0, 1.0))
        assert close(real(lm, own), real(lm, steered)), hold
        still = lane_logits(lm, vector.at(0.0), batch_of(lm), [hold])
        assert close(real(lm, still), real(lm, base)), hold
        held = lane_logits(lm, vector, batch_of(lm), [hold])
        assert not close(real(lm, held), real(lm, steered)), hold


def test_own_activations_and_strength_zero_keep_every_token(lm: LanguageModel) -> None:
    vector = vector_for(lm)
    with vector.on(lm):
        answers = lm.generate(PROMPTS, max_new_tokens=4)
    plain = lm.generate(PROMPTS, max_new_tokens=4)
    for hold in HOLDS:
        own = lane_answers(lm, vector, PROMPTS, [hold], max_new_tokens=4, factors=(1.0, 1.0))
        assert own == answers, hold
        assert lane_answers(lm, vector.at(0), PROMPTS, [hold], max_new_tokens=4) == plain, hold


def test_cached_is_uncached(lm: LanguageModel) -> None:
    for hold, scope in zip(HOLDS, itertools.cycle(SCOPES), strict=False):
        vector = vector_for(lm, scope=scope)
        cached, whole = (
            lane_answers(lm, vector, PROMPTS, [hold], max_new_tokens=5, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert cached == whole, hold


def test_built_in_model_exactly(harbor: LanguageModel) -> None:
    """Chat prompts, long answers, rows that end early."""
    split = tt.behavior("refusal").split(0).named("validation")
    prompts = [example.prompt for example in split.away[:4]]
    generator = torch.Generator().manual_seed(1)
    direction = {2: torch.randn(harbor.d_model, generator=generator)}
    vector = VectorSteering.from_directions(harbor, direction, alpha=3.0)
    with vector.on(harbor):
        answers = harbor.generate(prompts, max_new_tokens=12)
    assert lane_answers(harbor, vector, prompts, max_new_tokens=12) == answers
    (batch,) = harbor.batches([harbor.encode(prompt) for prompt in prompts])
    rows = batch.attention_mask.bool()
    with torch.no_grad(), vector.on(harbor):
        wanted = harbor.forward(batch)[rows]
    for hold in HOLDS:
        own = lane_logits(harbor, vector, batch, [hold], factors=(1.0, 1.0))[rows]
        assert close(own, wanted), hold
        held = lane_answers(harbor, vector, prompts, [hold], max_new_tokens=12, factors=(1.0, 1.0))
        assert held == answers, hold
        cached, whole = (
            lane_answers(harbor, vector, prompts[:3], [hold], max_new_tokens=8, use_cache=cache)
            for cache in (True, False)
        )
        assert cached == whole, hold


@torch.no_grad()
@pytest.mark.parametrize("site", KINDS)
def test_with_everything_held_only_the_pushes_are_left(lm: LanguageModel, site: str) -> None:
    if site in lm.sites.refused:
        with pytest.raises(TrimtabError, match="parallel"):
            lane_logits(lm, vector_for(lm, site=site), batch_of(lm))
        return
    layers = (0,) if site == "embed" else (1, 2)
    for scope in ("all", "post_instruction"):
        vector = vector_for(lm, layers, site, scope)
        streams = entering(lm, vector, ["qk+ov+mlp"])
        batch = batch_of(lm)
        rows = batch.attention_mask.bool()
        ends = batch.prompt_length, batch.instruction_end
        covered = vector.scope.mask(rows.long().cumsum(1) - 1, rows, *ends)
        for (part, layer), stream in streams.items():
            base, mine = stream.chunk(2)
            push = push_before(lm, vector, layer, part)
            assert bool(push.any()) == (layer > layers[0] or push_is_early(site, part, lm))
            wanted = covered[..., None] * push
            torch.testing.assert_close((mine - base)[rows], wanted[rows], rtol=1e-4, atol=1e-4)


def push_is_early(site: str, part: str, lm: LanguageModel) -> bool:
    """Whether a push at the first steered layer is read in that layer."""
    if site in ("embed", "resid_pre"):
        return True
    return part == "mlp" and site in ("resid_mid", "attn_out") and not lm.sites.parallel


def entering(
    lm: LanguageModel, vector: VectorSteering, holds: list[str]
) -> dict[tuple[str, int], Tensor]:
    """The stream that attention and MLP of every steered layer and those above read, both lanes."""
    streams: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            streams[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    both = spread(batch_of(lm), 2)
    factors = torch.tensor([0.0] * len(PROMPTS) + [1.0] * len(PROMPTS))
    with holding(lm, vector, holds, factors), ExitStack() as stack:
        for layer in range(min(vector.layers), lm.n_layers):
            places = (("attention", lm.sites.blocks[layer]), ("mlp", lm.sites.middle[layer]))
            for part, module in places:
                hook = module.register_forward_pre_hook(keep((part, layer)), with_kwargs=True)
                stack.callback(hook.remove)
        lm.forward(both)
    return streams


@torch.no_grad()
def test_holds_are_what_two_runs_patched_by_hand_give(lm: LanguageModel) -> None:
    vector, batch = vector_for(lm, (1,)), batch_of(lm)
    base: dict[tuple[str, int], Tensor] = {}

    def watch(call: AttentionCall) -> None:
        base["p", call.layer], base["v", call.layer] = call.probabilities(), call.value

    def mlp(layer: int, give: bool):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if give:
                return base["mlp", layer]
            base["mlp", layer] = output
            return None

        return hook

    def give(part: str):
        def handler(call: AttentionCall) -> Tensor | None:
            if part == "qk":
                return call.mix(base["p", call.layer])
            return call.mix(call.probabilities(), base["v", call.layer]) if part == "ov" else None

        return handler

    def run(part: str | None) -> Tensor:
        with ExitStack() as stack:
            for layer, module in enumerate(lm.sites.mlp):
                if part in (None, "mlp"):
                    hook = module.register_forward_hook(mlp(layer, part == "mlp"))
                    stack.callback(hook.remove)
            stack.enter_context(attending(lm, watch if part is None else give(part)))
            if part is not None:
                stack.enter_context(vector.on(lm))
            return lm.forward(batch)

    run(None)
    for part in ("qk", "ov", "mlp"):
        assert close(real(lm, lane_logits(lm, vector, batch, [part])), real(lm, run(part))), part


@torch.no_grad()
def test_shares_leave_the_size_of_the_stream_and_nothing_else(lm: LanguageModel) -> None:
    """Above one steered layer: what is read is the unsteered stream over the steered one's size."""
    vector, layer = vector_for(lm, (1,)), 2
    found = heads_of(lm)[layer]
    streams = entering(lm, vector, ["qk+ov+svv+mlp_direct"])
    seen = values_and_mlp_inputs(lm, vector, layer)
    rows = batch_of(lm).attention_mask.bool()
    read = expected(lm, found.norm, streams["attention", layer])
    weight = found.value.weights().flatten(0, 1).float()
    bias = found.value.biases()
    wanted = read @ weight.T + (0 if bias is None else bias.flatten())
    together = seen["values"].chunk(2)[1]
    torch.testing.assert_close(together[rows], wanted[rows], rtol=1e-4, atol=1e-4)
    read = expected(lm, found.mlp_norm, streams["mlp", layer])
    torch.testing.assert_close(seen["mlp"].chunk(2)[1][rows], read[rows], rtol=1e-4, atol=1e-4)


def expected(lm: LanguageModel, norm: nn.Module | None, both: Tensor) -> Tensor:
    """norm(base stream), over the size of the steered stream instead of its own."""
    base, mine = both.chunk(2)
    if norm is None:
        return base
    form = read_norm(norm, lm.d_model, "a norm")
    return form.direct(base, mine) + form.shift.float()


def values_and_mlp_inputs(
    lm: LanguageModel, vector: VectorSteering, layer: int
) -> dict[str, Tensor]:
    """What the attention mixes and what the MLP is called with, both lanes, shares held."""
    seen: dict[str, Tensor] = {}
    both = spread(batch_of(lm), 2)
    factors = torch.tensor([0.0] * len(PROMPTS) + [1.0] * len(PROMPTS))
    with holding(lm, vector, ["qk+ov+svv+mlp_direct"], factors), ExitStack() as stack:
        value = heads_of(lm)[layer].value
        rows = value.rows.flatten()
        hook = value.module.register_forward_hook(
            lambda m, a, out: seen.update(values=out[..., rows])
        )
        stack.callback(hook.remove)
        hook = lm.sites.mlp[layer].register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(mlp=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        stack.callback(hook.remove)
        lm.forward(both)
    return seen


@torch.no_grad()
def test_nulls_are_as_large_and_point_elsewhere(lm: LanguageModel) -> None:
    vector, batch = vector_for(lm), batch_of(lm)
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(4, 6, lm.d_model, generator=generator)
    held = _Held(lm, vector, set(), torch.tensor([0.0, 0.0, 1.0, 1.0]), 5)
    base, turned = held._base(mine, "mlp", 2).chunk(2)
    first, second = mine.chunk(2)
    change, wanted = second - turned, second - first
    assert torch.equal(base, first)
    torch.testing.assert_close(change.norm(dim=-1), wanted.norm(dim=-1))
    assert float(torch.cosine_similarity(change, wanted, dim=-1).abs().max()) < 0.9
    steered = steered_logits(lm, vector)
    for hold in ("ov", "svv", "mlp_direct", "mlp"):
        runs = [lane_logits(lm, vector, batch, [hold], null_seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1]) and not close(real(lm, runs[0]), real(lm, runs[2]))
        own = lane_logits(lm, vector, batch, [hold], factors=(1.0, 1.0), null_seed=0)
        assert close(real(lm, own), real(lm, steered)), hold


def test_undone_exactly_also_after_an_exception(lm: LanguageModel) -> None:
    before = lm.forward(batch_of(lm))
    factors = torch.tensor([0.0] * 3 + [1.0] * 3)
    with pytest.raises(KeyError), holding(lm, vector_for(lm), list(HOLDS), factors):
        raise KeyError
    assert torch.equal(lm.forward(batch_of(lm)), before)


def test_what_cannot_be_frozen_is_refused_by_name(llama: LanguageModel) -> None:
    vector, batch = vector_for(llama), batch_of(llama)
    with pytest.raises(TrimtabError, match="operation ablate"):
        freeze_table(Case(llama, planted.behavior(), vector.select(operation="ablate")))
    with pytest.raises(TrimtabError, match="nothing called 'kv'"):
        lane_logits(llama, vector, batch, ["ov+kv"])
    with pytest.raises(TrimtabError, match="strength 0"):
        freeze_table(Case(llama, planted.behavior(), vector.at(0.0)))


def test_table_on_a_planted_behavior(tmp_path) -> None:
    lm = planted.language_model()
    behavior, vector = planted.behavior(), planted.push(lm).at(2.0)
    told: list[tuple[int, int]] = []
    table = freeze_table(
        Case(lm, behavior, vector, max_new_tokens=planted.TOKENS),
        freezes=("qk", "ov", "mlp", "svv+mlp_direct"),
        nulls=2,
        split=None,
        progress=lambda *at: told.append(at),
    )
    assert told == [(i, 24) for i in range(1, 25)]
    for sign in (1, -1):
        whole, base = (table.row(name, sign).score.value for name in ("steered", "unsteered"))
        with vector.at(sign * vector.strength).on(lm):
            side = behavior.away if sign > 0 else behavior.toward
            answers = lm.generate([e.prompt for e in side], max_new_tokens=planted.TOKENS)
        assert table.row("steered", sign).answers == tuple(answers)
        letter = "Z" if sign > 0 else "Q"
        assert whole == 100 * sum(a.startswith(letter) for a in answers) / len(answers) > base
        for name in ("qk", "ov", "mlp", "svv+mlp_direct"):
            row = table.row(name, sign)
            # Nothing reads the stream above the last layer, so nothing there carries anything.
            assert row.lost is not None and row.lost.value == 0 and row.answers == tuple(answers)
            assert row.lost.low < 0 < row.lost.high and row.share is not None
            assert (row.null is None) == (name == "qk")
    assert "points lost" in str(table) and table.save(tmp_path / "t.json").exists()


def test_points_are_counted_prompt_by_prompt() -> None:
    def scored(*values: float) -> _FreezeRun:
        return _FreezeRun([""] * 4, torch.tensor(values, dtype=torch.float64), 1.0)

    base, whole, frozen = scored(0, 0, 0, 0), scored(1, 1, 1, 0), scored(0, 1, 0, 0)
    row = _row(1, "ov", base, whole, frozen, [scored(1, 1, 0, 0), scored(1, 1, 1, 0)], 0)
    assert row.lost is not None and row.null is not None and row.share is not None
    assert (row.score.value, row.lost.value, row.null.value) == (25, 50, 12.5)
    assert row.share.value == pytest.approx(200 / 3)
    for span in (row.score, row.lost, row.null, row.share):
        assert span.low < span.value < span.high and -100 <= span.low and span.high <= 100
    same = _row(1, "qk", base, whole, whole, [], 0)
    assert same.lost is not None and same.lost.value == 0 and same.lost.low < 0 < same.lost.high
    assert same.share is not None and same.share.value == 0 and same.share.high > 0
    assert same.null is None and _row(1, "qk", whole, whole, base, [], 0).share is None
