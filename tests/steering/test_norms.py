"""Norm calibration against a loop that reads one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.steering.norms import NEUTRAL_PROMPTS, calibrate

PROMPTS = ["The cats sleep.", "How do I borrow the ledger? Please talk only about cats.", "Ferry"]


def by_hand(lm: LanguageModel, prompts: list[str]) -> tuple[dict[int, float], int]:
    """Block outputs of one unpadded prompt at a time; first token and BOS left out."""
    totals, count = dict.fromkeys(range(lm.n_layers), 0.0), 0
    seen: dict[int, torch.Tensor] = {}

    def keep_output(layer: int):
        def hook(_module, _args, out) -> None:
            seen[layer] = out if isinstance(out, torch.Tensor) else out[0]

        return hook

    handles = [b.register_forward_hook(keep_output(i)) for i, b in enumerate(lm.sites.blocks)]
    for prompt in prompts:
        ids = lm.encode(prompt).ids
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
        kept = [i for i, token in enumerate(ids) if i and token != lm.tokenizer.bos_token_id]
        count += len(kept)
        for layer, hidden in seen.items():
            totals[layer] += float(hidden[0, kept].double().norm(dim=-1).sum())
    for handle in handles:
        handle.remove()
    return {layer: total / count for layer, total in totals.items()}, count


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("template", [True, False])
def test_batched_norms_equal_the_plain_loop(architecture, template):
    lm = tiny.language_model(architecture, template=template)
    expected, count = by_hand(lm, PROMPTS)
    found = calibrate(lm, PROMPTS)
    assert found.count == count
    assert found.mean == pytest.approx(expected, rel=1e-5)


def test_sinks_do_not_count():
    lm = tiny.language_model("llama")
    weight = lm.model.get_parameter("model.embed_tokens.weight")
    ids = [i for p in PROMPTS for i in lm.encode(p).ids if i != lm.tokenizer.bos_token_id]
    expected = float(weight[ids].detach().norm(dim=-1).mean())
    with torch.no_grad():
        weight[lm.encode("x").ids[0]] *= 1000  # a sink: far longer than any other token
    assert calibrate(lm, PROMPTS, site="resid_pre").mean[0] == pytest.approx(expected, rel=1e-5)


def test_scales_are_the_norm_over_root_width():
    norms = calibrate(tiny.language_model("qwen3"), PROMPTS)
    for layer, mu in norms.mean.items():
        assert norms.scales[layer] == mu / math.sqrt(tiny.WIDTH)


def test_the_default_prompts_and_half_precision_work():
    exact = calibrate(tiny.language_model("llama"))
    half = calibrate(tiny.language_model("llama", dtype=torch.bfloat16))
    assert exact.count == half.count > 10 * len(NEUTRAL_PROMPTS)
    assert half.mean == pytest.approx(exact.mean, rel=0.02)
    assert len(set(NEUTRAL_PROMPTS)) == len(NEUTRAL_PROMPTS)


def test_sites_are_read_as_sites():
    lm = tiny.language_model("granite")
    assert list(calibrate(lm, PROMPTS, site="embed").mean) == [0]
    post, pre = calibrate(lm, PROMPTS).mean, calibrate(lm, PROMPTS, site="resid_pre").mean
    assert [pre[i + 1] for i in range(3)] == pytest.approx([post[i] for i in range(3)], rel=1e-6)
    added = calibrate(lm, PROMPTS, site="mlp_out").mean
    assert all(0 < added[i] < post[i] for i in range(1, 4))  # scaled by the residual multiplier
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_refusals():
    lm = tiny.language_model("gpt_neox", template=False)
    with pytest.raises(TrimtabError, match="resid_mid"):
        calibrate(lm, PROMPTS, site="resid_mid")
    with pytest.raises(TrimtabError, match="first of each prompt"):
        calibrate(lm, [])
