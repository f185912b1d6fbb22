"""State matching: what is compared, that it is reached, and the table over layers."""

from __future__ import annotations

import pytest
import torch

import tiny
import trimtab
from trimtab.errors import TrimtabError
from trimtab.models.sites import Site
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.soft.soft import allowed_tokens
from trimtab.prompts.soft.states import match_every_layer, match_states, nearest_tokens, states
from trimtab.prompts.task.rows import lay_out, slot_ids

REQUESTS = ["How do I borrow the ledger?", "The ferry leaves the harbor at noon, is that so?"]
TARGETS = [(20, 31, 42), (17, 25, 9, 60, 2)]
REFERENCE = "Talk about cats."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_and_reference(lm, slot: str = "prefix"):
    rows = lay_out(lm, REQUESTS, slot, targets=TARGETS)
    text = REFERENCE if slot == "prefix" else " " + REFERENCE
    return rows, slot_ids(lm, text, rows[0])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("slot", ["prefix", "suffix"])
def test_states_are_the_streams_of_the_tokens_behind_the_slot(architecture, slot):
    """Against the model's own hidden states, one row at a time."""
    from conftest import tiny_model

    lm = tiny_model(architecture)
    rows, ids = rows_and_reference(lm, slot)
    sites = [Site("resid_post", 2), Site("resid_post", 0)]
    with torch.no_grad():
        deep, early = states(lm, rows, token_embeddings(lm, ids), sites)
        (last,) = states(lm, rows, token_embeddings(lm, ids), sites[:1], last=True)
    wanted: list[list[torch.Tensor]] = [[], []]
    ends = []
    for row in rows:
        encoded = row.encoded(ids)
        start = len(row.before) + len(ids)
        with torch.no_grad():
            hidden = lm.model(
                input_ids=torch.tensor([encoded.ids]), output_hidden_states=True
            ).hidden_states
        wanted[0].append(hidden[3][0, start:])
        wanted[1].append(hidden[1][0, start:])
        ends.append(hidden[3][0, encoded.prompt_length - 1])
    assert torch.allclose(deep, torch.cat(wanted[0]), atol=1e-4)
    assert torch.allclose(early, torch.cat(wanted[1]), atol=1e-4)
    assert torch.allclose(last, torch.stack(ends), atol=1e-4)
    assert len(deep) == sum(len(row.after) + len(row.target) - 1 for row in rows)


def test_the_pass_ends_at_the_deepest_site(llama):
    rows, ids = rows_and_reference(llama)
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, block in enumerate(llama.sites.blocks)
    ]
    try:
        states(llama, rows, token_embeddings(llama, ids), [Site("resid_post", 1)])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]
    assert llama.soft_count == 0 and llama.active_batch is None


def test_the_reference_matches_itself(llama):
    rows, ids = rows_and_reference(llama)
    found = match_states(llama, rows, ids, 2, generator=seeded(), init="reference", steps=5)
    assert found.soft.steps == 0  # near enough at once
    assert found.cosine == pytest.approx(1, abs=1e-5) and found.cosine_min > 0.9999
    assert found.ids == ids and found.text == REFERENCE
    wanted = plain_loss(llama, rows, ids, CrossEntropy())
    assert found.loss == pytest.approx(wanted, abs=1e-5)
    assert found.loss_projected == pytest.approx(wanted, abs=1e-5)
    assert found.continuation == found.continuation_projected


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("slot", ["prefix", "suffix"])
def test_random_tokens_are_brought_to_the_reference(llama, layer, slot):
    rows, ids = rows_and_reference(llama, slot)
    found = match_states(llama, rows, ids, layer, generator=seeded(), steps=40)
    assert found.cosine > found.cosine_start and found.recovered > 0.6
    assert found.soft.loss < 0.3 * found.soft.start_loss
    assert found.cosine_min <= found.cosine <= 1.0001


def test_another_length_is_aligned_from_the_end(llama):
    rows, ids = rows_and_reference(llama)
    found = match_states(llama, rows, ids, 1, generator=seeded(), k=3, steps=40)
    assert found.soft.vectors.shape[0] == len(found.ids) == 3 != len(ids)
    assert found.recovered > 0.4


def test_every_layer_has_a_line(llama):
    rows, ids = rows_and_reference(llama)
    mask = allowed_tokens(llama)
    mask[list(ids)] = False
    sweep = match_every_layer(llama, rows, ids, generator=seeded(), steps=8, allowed=mask, answer_tokens=4)  # fmt: skip
    assert [match.layer for match in sweep.matches] == [0, 1, 2, 3]
    table = sweep.table()
    assert len(table.rows) == 4 and REFERENCE in table.notes[0]
    assert sweep.reference_loss == pytest.approx(
        plain_loss(llama, rows, ids, CrossEntropy()), abs=1e-5
    )
    for match in sweep.matches:
        assert all(mask[i] for i in match.ids)
        assert match.ids == nearest_tokens(llama, match.soft.vectors, mask)
        assert match.loss == pytest.approx(
            float(soft_loss(llama, rows, match.soft.vectors, CrossEntropy()).detach()), abs=1e-5
        )
        assert match.loss_projected == pytest.approx(
            plain_loss(llama, rows, match.ids, CrossEntropy()), abs=1e-5
        )
        with match.soft.lever(llama).on(llama):
            assert llama.generate(REQUESTS[0], max_new_tokens=4) == match.continuation
        assert len(match.soft.curve) == match.soft.steps == 8
    # The same start at each layer.
    again = match_states(
        llama, rows, ids, 2, generator=seeded(), steps=0, init=[5], answer_tokens=0
    )
    assert again.cosine == again.cosine_start
    starts = [match.cosine_start for match in sweep.matches]
    rest = match_every_layer(
        llama, rows, ids, generator=seeded(), steps=0, layers=[2], allowed=mask, answer_tokens=0
    )
    assert rest.matches[0].cosine == pytest.approx(starts[2], abs=1e-6)
    assert sweep.to_dict()["matches"]


def test_harbor_reaches_the_reference_at_the_last_layer():
    lm = trimtab.load("harbor", dtype=torch.float32)
    rows = lay_out(lm, ["How do I borrow the harbor ledger?"])
    ids = slot_ids(lm, "Talk only about cats.", rows[0])
    found = match_states(
        lm, rows, ids, lm.n_layers - 1, generator=seeded(1), until=0.99, answer_tokens=0
    )
    assert found.cosine >= 0.99 > found.cosine_start
    assert found.loss is None and found.continuation == ""


def test_what_cannot_be_matched_is_refused(llama):
    rows, ids = rows_and_reference(llama)
    with pytest.raises(TrimtabError, match="layers 0 to 3"):
        match_states(llama, rows, ids, 4, generator=seeded())
