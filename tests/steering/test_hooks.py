from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.capture import capture
from trimtab.models.model import LanguageModel
from trimtab.models.sites import KINDS, Site
from trimtab.steering.hooks import Edit, steered
from trimtab.steering.scope import Scope

PROMPTS = ["the cats sleep", "How do I borrow the ledger?", "no"]
GENERATED = Scope.parse("generated")


def direction(lm: LanguageModel, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)


def logits(lm: LanguageModel, prompts: list[str] = PROMPTS) -> Tensor:
    """Logits of the prompts with an answer, at real tokens, padding zeroed."""
    encoded = [lm.encode(prompt, completion="Sure") for prompt in prompts]
    (batch,) = lm.batches(encoded)
    with torch.no_grad():
        return lm.forward(batch)[batch.rows.argsort()] * batch.attention_mask[
            batch.rows.argsort()
        ].unsqueeze(-1)


def read(lm: LanguageModel, kind: str, layer: int) -> Tensor:
    """Values of a site at the last prompt positions, `[prompts, 3, d_model]`."""
    encoded = [lm.encode(prompt) for prompt in PROMPTS]
    values = capture(lm, encoded, [layer], positions=3, site=kind)
    return values[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", ["add", "ablate", "affine"])
def test_an_edit_is_its_formula(lm: LanguageModel, kind: str, operation: str):
    if kind in lm.sites.refused:
        with pytest.raises(TrimtabError, match="parallel"):
            with steered(lm, [Edit(Site(kind, 2), operation, direction(lm), 1.0)]):
                pass
        return
    layer = 0 if kind == "embed" else 2
    c, amount, target = direction(lm), 0.7, 1.3
    before = read(lm, kind, layer)
    along = (before @ c).unsqueeze(-1) * c
    want = {
        "add": before + amount * c,
        "ablate": before - amount * along,
        "affine": before - amount * (along - target * c),
    }[operation]
    with steered(lm, [Edit(Site(kind, layer), operation, c, amount, target)]):
        got = read(lm, kind, layer)
        after = read(lm, "resid_post", layer)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(after, read(lm, "resid_post", layer), atol=1e-3)


def test_what_an_edit_of_a_part_does_to_the_stream(lm: LanguageModel):
    c = direction(lm)
    before = read(lm, "resid_post", 2)
    with steered(lm, [Edit(Site("mlp_out", 2), "add", c, 2.0)]):
        torch.testing.assert_close(read(lm, "resid_post", 2), before + 2 * c, rtol=0, atol=2e-5)


def test_a_middle_edit_reaches_the_mlp(llama: LanguageModel):
    c = direction(llama)
    with steered(llama, [Edit(Site("resid_mid", 1), "add", c, 2.0)]):
        middle = logits(llama)
    with steered(llama, [Edit(Site("attn_out", 1), "add", c, 2.0)]):
        torch.testing.assert_close(logits(llama), middle)
    with steered(llama, [Edit(Site("resid_post", 1), "add", c, 2.0)]):
        assert not torch.allclose(logits(llama), middle, atol=1e-3)


def test_against_a_model_whose_weights_do_the_same(llama: LanguageModel):
    """Adding to the output of a block equals a bias of its down projection, made by hand."""
    baked = tiny.model("llama")
    down = baked.model.layers[1].mlp.down_proj
    down.bias = torch.nn.Parameter(3.0 * direction(llama), requires_grad=False)
    with steered(llama, [Edit(Site("resid_post", 1), "add", direction(llama), 3.0)]):
        got = logits(llama)
    want = logits(LanguageModel(baked, llama.tokenizer))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_ablation_leaves_no_projection(llama: LanguageModel):
    c = direction(llama)
    with steered(llama, [Edit(Site("resid_post", 2), "ablate", c, 1.0)]):
        assert (read(llama, "resid_post", 2) @ c).abs().max() < 1e-5
    with steered(llama, [Edit(Site("resid_post", 2), "affine", c, 1.0, 4.0)]):
        torch.testing.assert_close(
            read(llama, "resid_post", 2) @ c, torch.full((3, 3), 4.0), rtol=0, atol=1e-5
        )


def test_edits_and_contexts_add_up(lm: LanguageModel):
    c, d = direction(lm, 1), direction(lm, 2)
    first = Edit(Site("resid_post", 1), "add", c, 1.5)
    second = Edit(Site("resid_post", 1), "add", d, -0.5)
    before = read(lm, "resid_post", 1)
    with steered(lm, [first, second]):
        together = logits(lm)
        torch.testing.assert_close(
            read(lm, "resid_post", 1), before + 1.5 * c - 0.5 * d, rtol=0, atol=1e-5
        )
    with steered(lm, [first]), steered(lm, [second]):
        assert torch.equal(logits(lm), together)


def test_contexts_apply_from_the_outside_in(llama: LanguageModel):
    c = direction(llama)
    add = Edit(Site("resid_post", 1), "add", c, 5.0)
    ablate = Edit(Site("resid_post", 1), "ablate", c, 1.0)
    with steered(llama, [add]), steered(llama, [ablate]):
        assert (read(llama, "resid_post", 1) @ c).abs().max() < 1e-5
    with steered(llama, [ablate]), steered(llama, [add]):
        assert ((read(llama, "resid_post", 1) @ c) - 5).abs().max() < 1e-5


@pytest.mark.parametrize("operation", ["add", "ablate", "affine"])
@pytest.mark.parametrize("scope", ["all", "last", "[0,6)"])
@pytest.mark.parametrize("kind", ["resid_post", "resid_mid"])
def test_row_factors(llama: LanguageModel, operation: str, scope: str, kind: str):
    edit = Edit(Site(kind, 1), operation, direction(llama), 0.8, 2.0, Scope.parse(scope))
    factors = [1.0, -0.5, 0.25]
    with steered(llama, [edit], row_factors=torch.tensor(factors)):
        together = logits(llama)
        texts = llama.generate(PROMPTS, max_new_tokens=6)
    for row, factor in enumerate(factors):
        with steered(llama, [replace(edit, amount=edit.amount * factor)]):
            torch.testing.assert_close(logits(llama)[row], together[row], rtol=0, atol=1e-5)
            assert llama.generate(PROMPTS, max_new_tokens=6)[row] == texts[row]


def test_row_factors_follow_the_rows_of_several_batches(llama: LanguageModel):
    prompts = [f"the cats {'sleep ' * (i % 7)}" for i in range(9)]
    edit = Edit(Site("resid_post", 1), "add", direction(llama), 3.0)
    factors = [i / 4 - 1 for i in range(9)]
    encoded = [llama.encode(prompt) for prompt in prompts]
    with torch.no_grad():
        for batch in llama.batches(encoded, max_rows=2):
            with steered(llama, [edit], factors):
                got = llama.forward(batch)[:, -1]
            for row, caller in enumerate(batch.rows.tolist()):
                with steered(llama, [replace(edit, amount=3.0 * factors[caller])]):
                    want = llama.model(torch.tensor([encoded[caller].ids])).logits[0, -1]
                torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5)


def test_row_factors_must_fit(llama: LanguageModel):
    edit = Edit(Site("resid_post", 1), "add", direction(llama), 3.0)
    with steered(llama, [edit], [1.0, 2.0]):
        with pytest.raises(TrimtabError, match="per prompt"):
            llama.generate(PROMPTS, max_new_tokens=1)
        with pytest.raises(TrimtabError, match="per prompt"):
            llama.model(torch.tensor([[5, 6]]))
        llama.model(torch.tensor([[5, 6], [6, 7]]))
    for factors in ([[1.0]], [math.nan]):
        with pytest.raises(TrimtabError, match="row factors"):
            with steered(llama, [edit], torch.tensor(factors)):
                pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", ["add", "ablate", "affine"])
def test_half_precision(dtype: torch.dtype, operation: str):
    for architecture in tiny.ARCHITECTURES:
        lm = tiny.language_model(architecture, dtype=dtype)
        c, site = direction(lm), Site("resid_post", 1)
        before = read(lm, "resid_post", 1)
        with steered(lm, [Edit(site, operation, c, 0.7, 2.0, Scope.parse("last"))]):
            got = read(lm, "resid_post", 1)
        want = before.clone()
        last = before[:, -1]
        amount = {"add": -0.7, "ablate": 0.7 * (last @ c), "affine": 0.7 * (last @ c - 2.0)}[
            operation
        ]
        # The change is rounded to the stream's dtype, then the sum: two roundings, no more.
        change = (torch.as_tensor(amount).reshape(-1, 1) * c).to(dtype).float()
        want[:, -1] = (last - change).to(dtype).float()
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        assert torch.equal(got[:, :-1], before[:, :-1])


def test_a_strength_that_the_dtype_cannot_hold():
    lm = tiny.language_model("llama", dtype=torch.float16)
    edit = Edit(Site("resid_post", 1), "add", direction(lm), 1e6, scope=GENERATED)
    with steered(lm, [edit]):
        with pytest.raises(TrimtabError, match="float16"):
            lm.generate("the cats")


def test_gradients_reach_the_direction(llama: LanguageModel):
    (batch,) = llama.batches([llama.encode("the cats")])
    c = direction(llama).requires_grad_()
    for operation in ("add", "ablate", "affine"):
        c.grad = None
        edit = Edit(Site("resid_post", 1), operation, c, 0.5, 1.0, Scope.parse("last"))
        with steered(llama, [edit]):
            llama.forward(batch)[:, -1, 7].sum().backward()
        assert c.grad is not None and c.grad.abs().max() > 1e-4
        step = 1e-2 * torch.nn.functional.normalize(c.grad, dim=0)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                with steered(llama, [replace(edit, direction=c.detach() + sign * step)]):
                    values.append(llama.forward(batch)[0, -1, 7])
        slope = float((values[0] - values[1]) / 2e-2)
        assert slope == pytest.approx(float(c.grad.norm()), rel=0.02)
    llama.model.zero_grad()


class Old(torch.nn.Module):
    """A block that returns a tuple and takes its input by keyword, as older ones do."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.self_attn, self.mlp, self.block = block.self_attn, block.mlp, block

    def forward(self, hidden_states: Tensor, **more: object) -> tuple[Tensor, str]:
        return self.block(hidden_states, **more), "extra"


class Caller(torch.nn.Module):
    """Calls a tuple block by keyword and hands the tensor on."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.old = Old(block)

    def forward(self, hidden_states: Tensor, **more: object) -> Tensor:
        hidden, extra = self.old(hidden_states=hidden_states, **more)
        assert extra == "extra"
        return hidden


def test_tuple_outputs_and_keyword_inputs(llama: LanguageModel):
    model = tiny.model("llama")
    callers = [Caller(block) for block in model.model.layers]
    model.model.layers = torch.nn.ModuleList(callers)
    old = LanguageModel(model, llama.tokenizer)
    blocks = torch.nn.ModuleList([caller.old for caller in callers])
    # The sites of the inner blocks, found on the model as it was.
    old.sites = replace(llama.sites, trunk=model.model, blocks=blocks)
    for kind in ("resid_post", "resid_pre"):
        edit = Edit(Site(kind, 1), "add", direction(llama), 2.0, scope=Scope.parse("last"))
        with steered(llama, [edit]):
            want = logits(llama)
        with steered(old, [edit]):
            assert torch.equal(logits(old), want)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"operation": "rotate"}, "operation"),
        ({"direction": torch.ones(5)}, "width"),
        ({"direction": torch.full((tiny.WIDTH,), math.nan)}, "finite"),
        ({"amount": math.inf}, "finite"),
        ({"target": math.nan}, "finite"),
        ({"site": Site("resid_post", 17)}, "layers"),
    ],
)
def test_edits_that_do_not_fit(llama: LanguageModel, change: dict, match: str):
    edit = replace(Edit(Site("resid_post", 1), "add", direction(llama), 1.0), **change)
    with pytest.raises(TrimtabError, match=match):
        with steered(llama, [edit]):
            pass
