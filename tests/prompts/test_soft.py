"""Soft prompts: training, the start, the lever, and the projection on a direction."""

from __future__ import annotations

import pytest
import torch

import planted
import tiny
from trimtab.errors import TrimtabError
from trimtab.prompts.scoring.objective import CrossEntropy, GapLoss, plain_loss
from trimtab.prompts.soft.direction import raise_projection
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.soft.soft import Soft, Start, allowed_tokens, batches, descend, train_soft
from trimtab.prompts.task.rows import lay_out, slot_ids
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering

REQUESTS = ["How do I borrow the ledger?", "The ferry leaves the harbor at noon, is that so?"]
TEXTS = {"prefix": "Talk about cats.", "suffix": " Talk about cats."}
TARGETS = [(20, 31, 42), (17, 25, 9, 60, 2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(lm, slot: str = "prefix"):
    return lay_out(lm, REQUESTS, slot, targets=TARGETS)


def soft_of(vectors) -> Soft:
    return Soft(vectors, 0.0, 0.0, (), 0, 0, 0.0, "given")


@pytest.mark.parametrize("slot", TEXTS)
def test_training_lowers_the_loss_and_keeps_the_best(llama, slot):
    rows = rows_of(llama, slot)
    found = train_soft(llama, rows, 3, generator=seeded(), steps=25)
    assert found.loss < found.start_loss - 0.2
    assert found.vectors.shape == (3, llama.d_model) and len(found.curve) == 25
    again = float(soft_loss(llama, rows, found.vectors, CrossEntropy()).detach())
    assert found.loss == pytest.approx(again, abs=1e-5)
    assert found.loss <= min(found.curve) + 1e-6
    assert found.curve[0] == pytest.approx(found.start_loss, abs=1e-5)


def test_the_best_is_kept_when_later_steps_are_worse(llama):
    rows = rows_of(llama)
    ids = train_soft(llama, rows, 2, generator=seeded(), steps=0).vectors

    def away(vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - ids).square().sum()

    near = ids + 1e-4
    found = descend(llama, Start(near, "near"), away, steps=6, learning_rate=10.0)
    assert found.best_step == 0 and torch.equal(found.vectors, near)
    assert found.loss == found.start_loss < max(found.curve)


def test_minibatches_are_scored_on_all_rows(llama):
    rows = rows_of(llama)
    found = train_soft(llama, rows, 2, generator=seeded(), steps=12, batch_size=1)
    again = float(soft_loss(llama, rows, found.vectors, CrossEntropy()).detach())
    assert found.loss == pytest.approx(again, abs=1e-5) and found.loss < found.start_loss
    # A step's loss is of one row: the two alternate in random order.
    assert abs(found.curve[0] - found.start_loss) > 1e-3


def test_the_seed_decides_and_the_global_state_does_not(llama):
    rows = rows_of(llama)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = train_soft(llama, rows, 2, generator=seeded(3), steps=3, batch_size=1)
    torch.manual_seed(2)
    second = train_soft(llama, rows, 2, generator=seeded(3), steps=3, batch_size=1)
    other = train_soft(llama, rows, 2, generator=seeded(4), steps=3, batch_size=1)
    assert torch.equal(first.vectors, second.vectors) and first.curve == second.curve
    assert not torch.equal(first.vectors, other.vectors)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_model_is_left_alone(llama):
    flags = [p.requires_grad for p in llama.model.parameters()]
    values = [p.detach().clone() for p in llama.model.parameters()]
    train_soft(llama, rows_of(llama), 2, generator=seeded(), steps=2)
    assert [p.requires_grad for p in llama.model.parameters()] == flags and any(flags)
    for parameter, value in zip(llama.model.parameters(), values, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is None


def test_where_it_starts(llama):
    rows = rows_of(llama)
    table = token_embeddings(llama)
    given = train_soft(llama, rows, 3, generator=seeded(), init=[7, 8], steps=0)
    assert torch.equal(given.vectors, table[[7, 8, 7]])
    named = train_soft(llama, rows, 1, generator=seeded(), init="reference", reference=(9, 4), steps=0)  # fmt: skip
    assert torch.equal(named.vectors, table[[9]]) and named.init == "reference"
    assert named.loss == pytest.approx(plain_loss(llama, rows, [9], CrossEntropy()), abs=1e-5)
    only = torch.zeros(len(table), dtype=torch.bool)
    only[[40, 41]] = True
    drawn = train_soft(llama, rows, 6, generator=seeded(), steps=0, allowed=only)
    assert all(any(torch.equal(v, table[i]) for i in (40, 41)) for v in drawn.vectors)
    mask = allowed_tokens(llama)
    assert not mask[llama.tokenizer.all_special_ids].any()
    assert mask.sum() == len(llama.tokenizer) - len(set(llama.tokenizer.all_special_ids))


def test_another_objective(llama):
    rows = lay_out(llama, REQUESTS)
    aim = GapLoss([20, 21], [30])
    found = train_soft(llama, rows, 2, generator=seeded(), steps=15, objective=aim)
    assert found.loss < found.start_loss - 0.5


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("slot", TEXTS)
def test_embeddings_of_a_text_have_the_texts_loss(architecture, slot):
    from conftest import tiny_model

    lm = tiny_model(architecture)
    rows = rows_of(lm, slot)
    ids = slot_ids(lm, TEXTS[slot], rows[0])
    wanted = plain_loss(lm, rows, ids, CrossEntropy())
    found = soft_loss(lm, rows, token_embeddings(lm, ids), CrossEntropy())
    assert float(found.detach()) == pytest.approx(wanted, abs=1e-5)
    other = plain_loss(lm, rows, ids[::-1], CrossEntropy())
    assert abs(other - wanted) > 2e-4


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("slot", TEXTS)
def test_the_lever_is_what_was_trained(architecture, slot, tmp_path):
    """Logits through the lever equal those of the training rows, in a batch and after a file."""
    from conftest import tiny_model

    lm = tiny_model(architecture)
    rows = [row.first(0) for row in rows_of(lm, slot)]
    vectors = torch.randn(3, lm.d_model, generator=seeded(1)) * token_embeddings(lm).std()
    lever = soft_of(vectors).lever(lm, slot)
    aim = GapLoss([20, 21], [30])
    wanted = [-float(soft_loss(lm, [row], vectors, aim).detach()) for row in rows]
    loaded = load_steering(lever.save(tmp_path / "soft.safetensors"))
    assert isinstance(loaded, PromptSteering) and loaded == lever
    plain = aim.gaps(lm.next_logits(REQUESTS)).tolist()
    with loaded.on(lm):
        assert aim.gaps(lm.next_logits(REQUESTS)).tolist() == pytest.approx(wanted, abs=1e-5)
    with lever.on(lm):
        assert aim.gaps(lm.next_logits(REQUESTS)).tolist() == pytest.approx(wanted, abs=1e-5)
        answers = lm.generate(REQUESTS, max_new_tokens=3)
        assert lm.generate(REQUESTS, max_new_tokens=3, use_cache=False) == answers
        assert lm.generate(REQUESTS[0], max_new_tokens=3) == answers[0]
    assert max(abs(a - b) for a, b in zip(plain, wanted, strict=True)) > 1e-3


def test_a_lever_of_another_model_is_refused(llama):
    lever = soft_of(torch.ones(2, llama.d_model)).lever(llama)
    other = tiny.language_model("llama", seed=1)
    with pytest.raises(TrimtabError, match="made for"), lever.on(other):
        pass


def test_batches_take_each_row_once_before_any_twice():
    drawn = batches(5, 2, seeded())
    taken = [next(drawn) for _ in range(5)]
    flat = [i for batch in taken for i in batch]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))


def test_what_cannot_be_trained_is_refused(llama):
    rows = rows_of(llama)
    with pytest.raises(TrimtabError, match="no length"):
        train_soft(llama, rows, 0, generator=seeded())
    with pytest.raises(TrimtabError, match="positive rate"):
        train_soft(llama, rows, 2, generator=seeded(), learning_rate=-1.0)


def test_raising_a_projection_moves_the_state_and_keeps_norms():
    lm = planted.language_model()
    behavior = planted.behavior(2, readout={"toward": ["Z"], "away": ["Q"]})
    vector = planted.push(lm)
    rows = lay_out(lm, behavior_prompts(behavior))
    found = raise_projection(lm, rows, vector, 4, generator=seeded(), steps=15, behavior=behavior)
    assert found.projection[3] > found.projection_start[3] + 0.5
    assert found.gap is not None and found.gap_start is not None
    assert found.gap > found.gap_start  # the direction is that of the readout's unembedding
    assert float(found.vectors.norm(dim=-1).max()) <= found.norm * 1.001
    lowered = raise_projection(lm, rows, vector, 4, generator=seeded(), steps=15, sign=-1)
    assert lowered.projection[3] < lowered.projection_start[3] - 0.5 and lowered.gap is None
    assert "layer 3" in str(found) and "readout gap" in str(found)


@pytest.mark.parametrize("slot", TEXTS)
def test_a_projection_is_that_of_a_steered_forward(llama, slot):
    """The figure reported equals the stream read by `capture` with the lever on."""
    from trimtab.models.capture import capture

    direction = torch.randn(llama.d_model, generator=seeded(2))
    rows = lay_out(llama, REQUESTS, slot)
    vector = VectorSteering.from_directions(llama, {1: direction})
    found = raise_projection(llama, rows, vector, 2, generator=seeded(), steps=5)
    with found.lever(llama, slot).on(llama):
        encoded = [llama.encode(request) for request in REQUESTS]
        values = capture(llama, encoded, [1])
    wanted = (values[:, 0, 0] @ (direction / direction.norm())).mean()
    assert found.projection[1] == pytest.approx(float(wanted), abs=1e-4)


def test_directions_at_several_layers_and_sites(llama):
    directions = {x: torch.randn(llama.d_model, generator=seeded(x)) for x in (0, 2)}
    vector = VectorSteering.from_directions(llama, directions, site="mlp_out")
    rows = lay_out(llama, REQUESTS)
    found = raise_projection(llama, rows, vector, 2, generator=seeded(), steps=10)
    assert set(found.projection) == {0, 2} and found.loss < found.start_loss


def behavior_prompts(behavior) -> list[str]:
    return [example.prompt for example in behavior.away]
