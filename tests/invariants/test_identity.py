"""Law 1: strength 0 is the identity, and leaving the context restores the logits, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.sites import KINDS, Site
from trimtab.steering.hooks import OPERATIONS, Edit, steered
from trimtab.steering.scope import Scope

PROMPTS = ["the cats", "How do I borrow the ledger?", "the ferry leaves the pier today"]
SCOPES = ("all", "last", "prompt", "post_instruction", "generated", "[1,4)")


def logits(lm: LanguageModel) -> Tensor:
    encoded = [lm.encode(prompt, completion="Sure, here") for prompt in PROMPTS]
    with torch.no_grad():
        return torch.cat([lm.forward(batch) for batch in lm.batches(encoded)])


def kinds(lm: LanguageModel) -> list[str]:
    return [kind for kind in KINDS if kind not in lm.sites.refused]


def edits(lm: LanguageModel, amount: float) -> list[Edit]:
    """Every site, operation and scope at least once."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, kind in enumerate(kinds(lm)):
        for j, operation in enumerate(OPERATIONS):
            direction = torch.randn(lm.d_model, generator=generator)
            site = Site(kind, 0 if kind == "embed" else (i + j) % lm.n_layers)
            scope = Scope.parse(SCOPES[(i + j) % len(SCOPES)])
            made.append(Edit(site, operation, direction / direction.norm(), amount, 0.7, scope))
    return made


def hooks(lm: LanguageModel) -> int:
    modules = list(lm.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_strength_zero(lm: LanguageModel):
    before, text = logits(lm), lm.generate(PROMPTS, max_new_tokens=5)
    with steered(lm, edits(lm, 0.0)):
        assert torch.equal(logits(lm), before)
        assert lm.generate(PROMPTS, max_new_tokens=5) == text
    with steered(lm, edits(lm, 3.0), row_factors=[0.0, 0.0, 0.0]):
        assert torch.equal(logits(lm), before)
    with steered(lm, []):
        assert torch.equal(logits(lm), before)


def test_a_row_of_factor_zero(lm: LanguageModel):
    encoded = [lm.encode(prompt, completion="Sure, here") for prompt in PROMPTS]
    (batch,) = lm.batches(encoded)
    with torch.no_grad():
        before = lm.forward(batch)
        with steered(lm, edits(lm, 3.0), row_factors=[1.0, 0.0, 1.0]):
            after = lm.forward(batch)
    real = batch.attention_mask.bool()
    for row, of_caller in enumerate(batch.rows.tolist()):
        same = torch.equal(after[row][real[row]], before[row][real[row]])
        assert same == (of_caller == 1)


def test_leaving(lm: LanguageModel):
    before, text = logits(lm), lm.generate(PROMPTS, max_new_tokens=5)
    with steered(lm, edits(lm, 3.0)):
        assert (logits(lm) - before).abs().max() > 0.1
        lm.generate(PROMPTS, max_new_tokens=5)
    assert hooks(lm) == 0
    assert torch.equal(logits(lm), before)
    assert lm.generate(PROMPTS, max_new_tokens=5) == text


def test_leaving_by_an_exception(lm: LanguageModel):
    before = logits(lm)
    with pytest.raises(ZeroDivisionError):
        with steered(lm, edits(lm, 3.0)):
            logits(lm)
            raise ZeroDivisionError
    assert hooks(lm) == 0 and lm.active_batch is None
    assert torch.equal(logits(lm), before)


def test_leaving_by_an_exception_inside_a_call(lm: LanguageModel):
    before = logits(lm)
    edit = Edit(Site("resid_post", 1), "add", torch.eye(lm.d_model)[0], 3.0)
    unknown = Edit(Site("resid_post", 2), "add", torch.eye(lm.d_model)[0], 3.0, 0.0, Scope("last"))
    ids = torch.tensor([lm.encode("the cats").ids])
    with torch.no_grad():
        cache = lm.model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(TrimtabError, match="boundary"):
        with steered(lm, [edit, unknown]):
            lm.model(input_ids=ids[:, :1], past_key_values=cache)
    assert hooks(lm) == 0 and lm.active_batch is None
    assert torch.equal(logits(lm), before)


def test_a_refused_edit_leaves_nothing(lm: LanguageModel):
    before = logits(lm)
    bad = Edit(Site("resid_post", 1), "add", torch.eye(lm.d_model + 1)[0], 3.0)
    with pytest.raises(TrimtabError, match="width"):
        with steered(lm, [*edits(lm, 3.0), bad]):
            pass
    assert hooks(lm) == 0
    assert torch.equal(logits(lm), before)


def test_nested_contexts_undo_in_order(lm: LanguageModel):
    outer, inner = edits(lm, 1.5)[:2], edits(lm, -2.0)[3:5]
    before = logits(lm)
    with steered(lm, outer):
        first = logits(lm)
        with steered(lm, inner):
            both = logits(lm)
            assert not torch.equal(both, first)
        assert torch.equal(logits(lm), first)
        with steered(lm, inner):
            assert torch.equal(logits(lm), both)
    assert torch.equal(logits(lm), before)


def test_contexts_may_be_left_in_any_order(llama: LanguageModel):
    before = logits(llama)
    first, second = steered(llama, edits(llama, 1.0)[:3]), steered(llama, edits(llama, 2.0)[4:6])
    with steered(llama, edits(llama, 2.0)[4:6]):
        alone = logits(llama)
    with ExitStack() as stack:
        first.__enter__()
        stack.enter_context(second)
        first.__exit__(None, None, None)
        assert torch.equal(logits(llama), alone)
    assert torch.equal(logits(llama), before)
