"""Projections of a soft prompt to allowed tokens."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.prompts.projections import mixture as mixture_module
from trimtab.prompts.projections.project import (
    PROJECTIONS,
    Projected,
    ProjectionTask,
    project,
    register,
    slot_losses,
)
from trimtab.prompts.scoring.objective import CrossEntropy, plain_loss
from trimtab.prompts.soft.embeddings import soft_loss, token_embeddings
from trimtab.prompts.soft.soft import Soft, allowed_tokens, train_soft
from trimtab.prompts.task.rows import lay_out, slot_ids

REQUESTS = ["How do I borrow the ledger?", "The ferry leaves the harbor at noon, is that so?"]
TARGETS = [(20, 31, 42), (17, 25, 9, 60, 2)]
QUICK = {
    "nearest": {},
    "straight_through": {"steps": 12},
    "mixture": {"steps": 25},
    "lattice": {"top": 6, "width": 8, "keep": 8},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(lm, slot: str = "prefix"):
    return lay_out(lm, REQUESTS, slot, targets=TARGETS)


def soft_of(vectors) -> Soft:
    return Soft(vectors, 0.0, 0.0, (), 0, 0, 0.0, "given")


@pytest.fixture(scope="module")
def trained(llama):
    return train_soft(llama, rows_of(llama), 3, generator=seeded(), steps=30)


def task_of(lm, soft, allowed=None, **more) -> ProjectionTask:
    mask = allowed_tokens(lm, allowed)
    return ProjectionTask(lm, tuple(rows_of(lm)), soft, mask, seeded(), **more)


def test_the_registry_holds_the_four():
    assert set(QUICK) <= set(PROJECTIONS)


@pytest.mark.parametrize("method", QUICK)
def test_only_allowed_tokens_come_out_and_their_loss_is_the_plain_one(llama, trained, method):
    rows = rows_of(llama)
    free = project(llama, rows, trained, method, generator=seeded(), **QUICK[method])
    mask = allowed_tokens(llama)
    mask[list(free.ids)] = False
    bound = project(llama, rows, trained, method, generator=seeded(), allowed=mask, **QUICK[method])
    assert all(mask[i] for i in bound.ids) and len(bound.ids) == 3
    assert not set(bound.ids) & set(free.ids)
    for found in (free, bound):
        wanted = plain_loss(llama, rows, found.ids, CrossEntropy())
        assert found.loss == pytest.approx(wanted, abs=1e-5)
        assert found.legal is None


@pytest.mark.parametrize("method", QUICK)
def test_a_single_allowed_token_is_the_only_way(llama, trained, method):
    mask = torch.zeros(llama.known_ids, dtype=torch.bool)
    mask[77] = True
    found = project(
        llama, rows_of(llama), trained, method, generator=seeded(), allowed=mask, **QUICK[method]
    )
    assert found.ids == (77, 77, 77)


@pytest.mark.parametrize("method", ["nearest", "lattice"])
def test_embeddings_of_tokens_project_to_them(llama, method):
    rows = rows_of(llama)
    ids = slot_ids(llama, "Talk about cats.", rows[0])
    options = {"keep": 1, "prior": 0.0} if method == "lattice" else {}
    soft = soft_of(2.5 * token_embeddings(llama, ids))  # the length does not matter
    assert project(llama, rows, soft, method, generator=seeded(), **options).ids == ids


@pytest.mark.parametrize("method", ["straight_through", "mixture", "lattice"])
def test_the_searching_ones_are_no_worse_than_the_nearest(llama, trained, method):
    rows = rows_of(llama)
    near = project(llama, rows, trained, "nearest", generator=seeded())
    found = project(llama, rows, trained, method, generator=seeded(), **QUICK[method])
    assert found.loss < near.loss


def test_a_mixture_ends_in_a_corner(llama, trained, monkeypatch):
    """Seen by the vectors that its losses are read with: at a corner they are those of tokens."""
    task = task_of(llama, trained)

    def distances(**options) -> tuple[list[float], torch.Tensor]:
        seen: list[torch.Tensor] = []

        def watched(lm, rows, vectors, objective):
            seen.append(vectors.detach())
            return soft_loss(lm, rows, vectors, objective)

        monkeypatch.setattr(mixture_module, "soft_loss", watched)
        PROJECTIONS["mixture"](task, **options)
        near = [torch.cdist(vectors, task.embeddings).min(-1).values.max() for vectors in seen]
        return [float(x / task.embeddings.norm(dim=-1).mean()) for x in near], seen[-1]

    found, last = distances(
        steps=50, learning_rate=0.5, sharpness=6.0, temperature=0.05, penalty=0.5
    )
    assert found[0] > 0.5 and found[-1] < 0.02
    # At a corner the mixture's loss is the tokens' loss.
    corner = task.ids(torch.cdist(last, task.embeddings).argmin(-1))
    rows = rows_of(llama)
    mixed = float(soft_loss(llama, rows, last, CrossEntropy()).detach())
    assert mixed == pytest.approx(plain_loss(llama, rows, corner, CrossEntropy()), abs=0.05)
    flat, _ = distances(steps=20, learning_rate=0.01, sharpness=6.0, temperature=1.0, penalty=0.0)
    assert flat[-1] > 0.5 * flat[0]  # it is the annealing that does it


def test_the_lattice_prefers_what_the_model_expects(llama):
    """A strong prior gives the likelier sequence among the near ones."""
    soft = soft_of(torch.randn(3, llama.d_model, generator=seeded(5)))
    task = task_of(llama, soft)
    plain = PROJECTIONS["lattice"](task, prior=0.0, keep=1)
    likely = PROJECTIONS["lattice"](task, prior=100.0, keep=1, width=64)
    assert log_prior(llama, likely) > log_prior(llama, plain)


def log_prior(lm, slot) -> float:
    row = rows_of(lm)[0]
    ids = torch.tensor([[*row.before, *slot]])
    with torch.no_grad():
        log_p = lm.model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(row.before)
    return sum(float(log_p[start + i - 1, token]) for i, token in enumerate(slot))


def test_legal_slots_are_preferred(llama, trained):
    rows = rows_of(llama)
    first = project(llama, rows, trained, "lattice", generator=seeded(), top=4)
    asked: list[int] = []

    def legal(slots):
        asked.append(len(slots))
        return [slot[0] != first.ids[0] for slot in slots]

    found = project(llama, rows, trained, "lattice", generator=seeded(), top=4, legal=legal)
    assert asked and found.legal is True and found.ids[0] != first.ids[0]
    # Where nothing is legal, something comes out all the same, and says so.
    none = project(
        llama,
        rows,
        trained,
        "lattice",
        generator=seeded(),
        legal=lambda slots: [False] * len(slots),
    )
    assert none.legal is False and len(none.ids) == 3


@pytest.mark.parametrize("slot", ["prefix", "suffix"])
def test_losses_of_many_slots_are_the_plain_ones(llama, slot):
    rows = rows_of(llama, slot)
    drawn = torch.randint(10, 300, (5, 4), generator=seeded()).tolist()
    slots = [*drawn, drawn[0][:2]]
    found = slot_losses(llama, rows, slots)
    wanted = [plain_loss(llama, rows, ids, CrossEntropy()) for ids in slots]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("method", ["straight_through", "mixture"])
def test_minibatches_and_seeds(llama, trained, method):
    rows = rows_of(llama)
    options = {**QUICK[method], "batch_size": 1}
    runs = [project(llama, rows, trained, method, generator=seeded(2), **options) for _ in range(2)]
    assert runs[0].ids == runs[1].ids and runs[0].loss == runs[1].loss


def test_what_cannot_be_projected_is_refused(llama, trained):
    rows = rows_of(llama)
    with pytest.raises(TrimtabError, match="no such projection"):
        project(llama, rows, trained, "best", generator=seeded())
    with pytest.raises(TrimtabError, match="temperature"):
        project(llama, rows, trained, "mixture", generator=seeded(), temperature=0.0)
    with pytest.raises(TrimtabError, match="prior"):
        project(llama, rows, trained, "lattice", generator=seeded(), prior=-1.0)
    with pytest.raises(TrimtabError, match="option 'depth'"):
        project(llama, rows, trained, "nearest", generator=seeded(), depth=3)


def test_another_projection_can_be_registered(llama, trained):
    @register("always the first")
    def first(task: ProjectionTask, *, shift: int = 0) -> tuple[int, ...]:
        return task.ids(torch.full((task.vectors.shape[0],), shift))

    try:
        found = project(
            llama, rows_of(llama), trained, "always the first", generator=seeded(), shift=1
        )
    finally:
        del PROJECTIONS["always the first"]
    second = int(allowed_tokens(llama).nonzero()[1])
    assert isinstance(found, Projected) and found.ids == (second,) * 3
    assert found.method == "always the first"
