"""Rows around a slot: the same tokens as the prompt lever's, and texts that come back in context."""

from __future__ import annotations

import pytest
import torch

import tiny
from trimtab.errors import TrimtabError
from trimtab.prompts.scoring.objective import CrossEntropy, GapLoss, plain_loss
from trimtab.prompts.soft.embeddings import onehot_gradient, soft_loss, token_embeddings
from trimtab.prompts.task.rows import lay_out, round_trips, slot_ids, slot_text
from trimtab.steering.prompt import prompt

REQUESTS = ["How do I borrow the ledger?", "Who sleeps?", [{"role": "user", "content": "At noon?"}]]
WORDS = {"system": "Talk about cats.", "prefix": "Talk about cats.", "suffix": " Talk about cats."}
TARGETS = [[40, 41, 42, 2], [50, 51], [60]]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("slot", list(WORDS))
def test_rows_are_the_levers_prompts(slot, template):
    lm = tiny.language_model("llama", template=template)
    requests = REQUESTS if template else REQUESTS[:2]
    if slot == "system" and not template:
        return
    rows = lay_out(lm, requests, slot, targets=TARGETS[: len(requests)])
    for row, request in zip(rows, requests, strict=True):
        ids = slot_ids(lm, WORDS[slot], row)
        assert slot_text(lm, ids) == WORDS[slot]
        with prompt(WORDS[slot], slot).on(lm):
            encoded = lm.encode(request)
        fed = row.encoded(ids)
        assert fed.ids == encoded.ids + list(row.target[:-1])
        assert fed.prompt_length == encoded.prompt_length
        assert fed.instruction_end == encoded.instruction_end
        assert row.first(0).encoded(ids).ids == encoded.ids


def test_round_trip_is_of_the_text_in_context(llama):
    rows = lay_out(llama, REQUESTS, "prefix")
    whole = slot_ids(llama, "Talk about cats.", rows[0])
    letters = tuple(llama.tokenizer.convert_tokens_to_ids(list("cats")))
    # Four letters decode to a word that is tokenized otherwise.
    assert round_trips(llama, [whole, letters, ()], rows) == [True, False, False]
    # What merges with the text behind the slot is refused there alone.
    space = llama.tokenizer.convert_tokens_to_ids("Ġ")
    assert round_trips(llama, [(*whole, space)], lay_out(llama, ["ferry"], separator="")) == [False]
    assert round_trips(llama, [(*whole, space)], lay_out(llama, ["?", "!"], separator="")) == [True]


def test_weights_and_first_tokens(llama):
    rows = lay_out(llama, REQUESTS, targets=TARGETS, early=2, early_weight=3.0)
    assert rows[0].weights == (3.0, 3.0, 1.0, 1.0) and rows[0].first(3).weights == (3.0, 3.0, 1.0)
    with pytest.raises(TrimtabError, match="separator"):
        lay_out(llama, REQUESTS, "suffix", separator=" ")


@pytest.mark.parametrize("slot", ["prefix", "suffix"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_soft_loss_is_the_plain_loss(architecture, slot):
    lm = tiny.language_model(architecture)
    rows = lay_out(lm, REQUESTS, slot, targets=TARGETS)
    ids = slot_ids(lm, WORDS[slot], rows[0])
    vectors = token_embeddings(lm, ids)
    loss = CrossEntropy()
    plain = plain_loss(lm, rows, ids, loss)
    assert float(soft_loss(lm, rows, vectors, loss).detach()) == pytest.approx(plain, abs=1e-5)
    gap, short = GapLoss([10, 11], [12]), [row.first(0) for row in rows]
    plain = plain_loss(lm, short, ids, gap)
    assert float(soft_loss(lm, short, vectors, gap).detach()) == pytest.approx(plain, abs=1e-5)


def test_cross_entropy_is_the_weighted_mean_of_all_tokens(llama):
    rows = lay_out(llama, REQUESTS, targets=TARGETS, early=1)
    ids = slot_ids(llama, WORDS["prefix"], rows[0])
    total = weights = 0.0
    for row in rows:
        tokens = torch.tensor([row.ids(ids)])
        with torch.no_grad():
            log_p = llama.model(tokens).logits[0].double().log_softmax(-1)
        start = tokens.shape[1] - len(row.target)
        for t, (token, weight) in enumerate(zip(row.target, row.weights, strict=True)):
            total -= weight * float(log_p[start + t - 1, token])
            weights += weight
    assert plain_loss(llama, rows, ids, CrossEntropy()) == pytest.approx(total / weights, abs=1e-5)


def test_gradient_foretells_a_small_step(llama):
    rows = lay_out(llama, REQUESTS, targets=TARGETS)
    ids = slot_ids(llama, WORDS["prefix"], rows[0])
    loss, gradient = onehot_gradient(llama, rows, ids, CrossEntropy())
    table = token_embeddings(llama).detach()
    assert gradient.shape == (len(ids), len(table))
    step, other = 1e-2, 77
    moved = table[list(ids)].clone()
    moved[1] += step * (table[other] - table[ids[1]])
    with torch.no_grad():
        after = float(soft_loss(llama, rows, moved, CrossEntropy()))
    predicted = step * float(gradient[1, other] - gradient[1, ids[1]])
    assert after - loss == pytest.approx(predicted, rel=0.05, abs=2e-6)
    assert all(p.grad is None for p in llama.model.parameters())
