from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.models.sites import KINDS, Site, find_sites

PROMPTS = ["the cats sleep on the pier", "How do I borrow the ledger?", "harbor"]


def read(lm: LanguageModel, kind: str) -> torch.Tensor:
    """`[prompts, layers, positions, d_model]` of one kind of site at the last three positions."""
    encoded = [lm.encode(prompt) for prompt in PROMPTS]
    layers = [0] if kind == "embed" else list(range(lm.n_layers))
    values = capture(lm, encoded, layers, positions=3, site=kind)
    return values


def test_the_stream_adds_up(lm: LanguageModel):
    before, after = read(lm, "resid_pre"), read(lm, "resid_post")
    attention, mlp = read(lm, "attn_out"), read(lm, "mlp_out")
    torch.testing.assert_close(read(lm, "embed"), before[:, :1])
    assert torch.equal(after[:, :-1], before[:, 1:])
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)
    # None of the three parts is negligible, else the sum would prove nothing.
    for part in (before, attention, mlp):
        assert part.abs().mean() > 0.02 * after.abs().mean()


def test_the_middle_of_a_block(lm: LanguageModel):
    if lm.sites.parallel:
        assert lm.model.config.model_type in tiny.PARALLEL
        with pytest.raises(TrimtabError, match="parallel") as caught:
            lm.sites.reading(Site("resid_mid", 0))
        assert "resid_post" in caught.value.advice
        return
    assert lm.model.config.model_type not in tiny.PARALLEL
    middle = read(lm, "resid_mid")
    attention, mlp = read(lm, "attn_out"), read(lm, "mlp_out")
    torch.testing.assert_close(read(lm, "resid_pre") + attention, middle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(middle + mlp, read(lm, "resid_post"), rtol=1e-5, atol=1e-5)


def test_against_the_librarys_own_hidden_states(lm: LanguageModel):
    # A model of its own: asking for hidden states leaves the library's hooks on it.
    lm = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)
    encoded = lm.encode(PROMPTS[0])
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    values = capture(lm, [encoded], range(lm.n_layers), positions=len(encoded.ids))
    # The last of the library's states is after the final norm: no resid_post.
    for layer in range(lm.n_layers - 1):
        torch.testing.assert_close(values[0, layer], states[layer + 1][0], rtol=1e-5, atol=1e-5)
    assert lm.sites.final_norm is not None
    with torch.no_grad():
        normed = lm.sites.final_norm(values[0, -1])
    torch.testing.assert_close(normed, states[-1][0], rtol=1e-5, atol=1e-5)


def test_writers(lm: LanguageModel):
    width = lm.d_model
    for attention, mlp in zip(lm.sites.attention_writer, lm.sites.mlp_writer, strict=True):
        assert isinstance(attention, nn.Module)
        assert width in next(attention.parameters()).shape
        if lm.model.config.model_type == "mixtral":
            assert mlp is None
        else:
            assert isinstance(mlp, nn.Module)
            assert width in next(mlp.parameters()).shape
    assert lm.sites.unembedding is lm.model.get_output_embeddings()
    assert lm.sites.embedding is lm.model.get_input_embeddings()
    assert len(lm.sites.blocks) == lm.n_layers


def test_what_is_special(lm: LanguageModel):
    kind = lm.model.config.model_type
    assert lm.sites.post_norm == (kind in ("gemma2", "gemma3_text", "olmo2"))
    assert lm.sites.residual_multiplier == (pytest.approx(0.3) if kind == "granite" else 1.0)


def test_sequential_gpt_neox_has_a_middle():
    config = tiny.config("gpt_neox")
    config.use_parallel_residual = False
    lm = tiny.language_model(config)
    assert not lm.sites.parallel
    total = read(lm, "resid_pre") + read(lm, "attn_out")
    torch.testing.assert_close(total, read(lm, "resid_mid"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_found_in_half_precision(dtype: torch.dtype):
    for architecture in tiny.ARCHITECTURES:
        sites = find_sites(tiny.model(architecture, dtype=dtype))
        expected = {"resid_mid"} if architecture in tiny.PARALLEL else set()
        assert set(sites.refused) == expected, architecture


def test_the_probe_is_one_tiny_forward_and_restores_everything(lm: LanguageModel):
    model = tiny.model(tiny.config(lm.model.config.model_type.removesuffix("_text")))
    # Training mode of some modules, hooks and random state are the caller's.
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda m, a, o: sizes.append(o.logits.shape[1]))
    state = torch.random.get_rng_state()
    find_sites(model)
    handle.remove()
    assert sizes == [3]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_that_adds_something_else_loses_those_sites_only():
    model = tiny.model("llama")
    block = model.model.layers[2]
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5
    sites = find_sites(model)
    assert set(sites.refused) == {"attn_out", "mlp_out", "resid_mid"}
    with pytest.raises(TrimtabError, match="block 2"):
        sites.writing(Site("mlp_out", 0))
    assert sites.writing(Site("resid_post", 2)).module is block


def test_a_model_without_blocks_is_refused():
    model = tiny.model("llama")
    model.model.layers = nn.ModuleList(model.model.layers[:2])
    with pytest.raises(TrimtabError, match="blocks"):
        find_sites(model)


def test_site_text_round_trip():
    for kind in KINDS:
        site = Site(kind, 0 if kind == "embed" else 3)
        assert Site.parse(str(site)) == site
    assert Site.parse("embed") == Site("embed", 0)


@pytest.mark.parametrize(
    "text", ["resid.3", "resid_post", "resid_post.-1", "resid_post.x", "", "embed.1"]
)
def test_unknown_sites_are_refused(text: str):
    with pytest.raises(TrimtabError):
        Site.parse(text)


def test_a_layer_that_does_not_exist(llama: LanguageModel):
    with pytest.raises(TrimtabError, match="4 layers"):
        llama.sites.reading(Site("resid_post", 4))
