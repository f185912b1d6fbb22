"""Vectors trained by preference, against a plain re-computation of the objective and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.methods import Task, find, training
from trimtab.methods.preference import Preference
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.steering.norms import calibrate
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

THINGS = ("ferry", "cats", "ledger", "pier", "harbor", "noon", "rules", "work")
TOWARD = [f"Please talk about the {thing}, thank you." for thing in THINGS]
AWAY = [f"How do I borrow {thing} today?" for thing in THINGS]
WANTED = [{"prompt": prompt, "completion": "Sure, sleep."} for prompt in AWAY]
UNWANTED = [{"prompt": prompt, "completion": "I am sorry."} for prompt in TOWARD]
TOKENS = 4
QUICK = {"steps": 12, "learning_rate": 0.1, "max_completion_tokens": TOKENS}


def behavior(**more: object) -> Behavior:
    return Behavior(**{"name": "polite", "toward": TOWARD, "away": AWAY, **more})


def log_p(lm: LanguageModel, encoded: Encoded, steering: VectorSteering | None = None) -> Tensor:
    """Log-probability of each answer token from one plain forward, float64 `[answer]`."""
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        if steering is None:
            logits = lm.model(input_ids=ids).logits
        else:
            with steering.on(lm):
                logits = lm.model(input_ids=ids).logits
    return picked(logits[0], encoded)


def picked(logits: Tensor, encoded: Encoded) -> Tensor:
    start = encoded.prompt_length
    targets = torch.tensor(encoded.ids[start:])
    return logits[start - 1 : -1].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def cut(encoded: Encoded) -> Encoded:
    end = encoded.prompt_length + TOKENS
    return Encoded(encoded.text, encoded.ids[:end], encoded.prompt_length, encoded.instruction_end)


def pairs(lm: LanguageModel, completions: Sequence[dict]) -> list[tuple[Encoded, Encoded]]:
    """Wanted answer and the model's own, both cut to the trained length."""
    prompts = [x["prompt"] for x in completions]
    own = lm.generate(prompts, max_new_tokens=TOKENS + 8)
    return [
        (cut(lm.encode(x["prompt"], x["completion"])), cut(lm.encode(x["prompt"], answer)))
        for x, answer in zip(completions, own, strict=True)
    ]


def plain_loss(
    lm: LanguageModel, completions: Sequence[dict], phi: float, v: VectorSteering | None = None
) -> float:
    losses = []
    for wanted, own in pairs(lm, completions):
        beta = max(phi * float(log_p(lm, own).sum() - log_p(lm, wanted).sum()), 1.0)
        delta = beta * log_p(lm, wanted, v).mean() - log_p(lm, own, v).mean()
        losses.append(math.log1p(math.exp(-float(delta))))
    return sum(losses) / len(losses)


def test_it_learns_on_every_architecture_and_touches_nothing(lm: LanguageModel) -> None:
    before = [p.detach().clone() for p in lm.model.parameters()]
    vector = find(lm, behavior(), "preference", split=None, completions=WANTED, **QUICK)
    assert all(torch.equal(p, q) for p, q in zip(lm.model.parameters(), before, strict=True))
    assert vector.layers == (0,) and str(vector.scope) == "all" and vector.strength > 0
    details = vector.provenance["details"]
    unsteered, steered = plain_loss(lm, WANTED, 1.0), plain_loss(lm, WANTED, 1.0, vector)
    assert details["loss_unsteered"] == pytest.approx(unsteered, rel=1e-3)
    assert details["loss_trained"] == pytest.approx(steered, rel=1e-2, abs=1e-3)
    assert steered < 0.9 * unsteered


def test_the_wanted_answer_gains_on_the_own_one(llama: LanguageModel) -> None:
    vector = find(llama, behavior(), "preference", split=None, completions=WANTED, **QUICK)

    def margin(v: VectorSteering | None) -> float:
        each = pairs(llama, WANTED)
        return sum(
            float(log_p(llama, w, v).mean() - log_p(llama, own, v).mean()) for w, own in each
        ) / len(each)

    assert margin(vector) > margin(None) + 0.5


@pytest.mark.parametrize("pieces", [False, True])
def test_the_gradient_is_the_plain_one_also_in_pieces(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, pieces: bool
) -> None:
    monkeypatch.setattr(training, "REFERENCE_TOKENS", 10_000)  # the exact KL
    wanted = tuple(llama.encode(x["prompt"], x["completion"]) for x in WANTED[:3])
    own = tuple(llama.encode(x["prompt"], "The cats sleep on the pier now.") for x in WANTED[:3])
    kept = tuple(llama.encode(x["prompt"], x["completion"]) for x in UNWANTED[:2])
    betas = torch.tensor([1.0, 2.5, 1.7])
    task = _task(llama)
    rows = training.Rows(-1, wanted, kept, Preference(betas), own)
    trainer = training.Trainer(task, 1, 0.7, [rows], keep=0.4)
    w = torch.randn(32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    factors = torch.tensor([0.5, 0.8, 1.2, 1.5])
    if pieces:
        whole = llama.batches
        monkeypatch.setattr(llama, "batches", lambda e, **_: whole(e, max_tokens=40, max_rows=2))
        assert len(list(llama.batches([*wanted, *own]))) > 2
    got = trainer._gradient(w, rows, [2, 0], [0, 1], factors)

    def logits(encoded: Encoded, amount: float) -> Tensor:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + amount * 0.7 * w

        handle = llama.model.get_submodule("model.layers.1").register_forward_hook(add)
        try:
            return llama.model(input_ids=torch.tensor([encoded.ids])).logits[0]
        finally:
            handle.remove()

    loss = torch.zeros((), dtype=torch.float64)
    for place, factor in zip([2, 0], [0.5, 0.8], strict=True):
        good = picked(logits(wanted[place], -factor), wanted[place]).mean()
        bad = picked(logits(own[place], -factor), own[place]).mean()
        loss = loss - nn.functional.logsigmoid(float(betas[place]) * good - bad) / 2
    kl, count = torch.zeros((), dtype=torch.float64), 0
    for encoded, factor in zip(kept, [1.2, 1.5], strict=True):
        start = encoded.prompt_length - 1
        p = logits(encoded, 0.0)[start:-1].detach().double().log_softmax(-1)
        q = logits(encoded, -factor)[start:-1].double().log_softmax(-1)
        kl, count = kl + (p.exp() * (p - q)).sum(), count + len(p)
    expected = torch.autograd.grad(loss + 0.4 * kl / count, w)[0]
    assert float(expected.norm()) > 1e-3
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_beta_is_that_of_the_unsteered_model(llama: LanguageModel) -> None:
    """phi = 0 leaves every beta at 1; a large phi weighs the wanted answer more."""
    losses = {}
    for phi in (0.0, 3.0):
        options = {**QUICK, "steps": 1, "learning_rate": 1e-9}
        vector = find(
            llama, behavior(), "preference", split=None, completions=WANTED, phi=phi, **options
        )
        losses[phi] = vector.provenance["details"]["loss_unsteered"]
        assert losses[phi] == pytest.approx(plain_loss(llama, WANTED, phi), rel=1e-3)
    assert losses[3.0] > 1.5 * losses[0.0]


def test_the_objective_is_the_formula() -> None:
    betas = torch.tensor([1.0, 4.0, 2.0])
    total = torch.tensor([-6.0, -2.0, -9.0, -1.0])
    tokens = torch.tensor([3.0, 2.0, 3.0, 4.0])
    got = float(Preference(betas)(total, tokens, [1, 2]))
    deltas = [4.0 * -2.0 + 3.0, 2.0 * -1.0 + 0.25]
    assert got == pytest.approx(sum(math.log1p(math.exp(-d)) for d in deltas) / 2)


def test_both_signs_and_the_other_sign(llama: LanguageModel) -> None:
    longer = {**QUICK, "steps": 30, "phi": 0.02}
    both = find(
        llama, behavior(), "preference", split=None, direction="both",
        completions=[*WANTED, *UNWANTED], **longer,
    )  # fmt: skip
    assert plain_loss(llama, WANTED, 0.02, both) < 0.8 * plain_loss(llama, WANTED, 0.02)
    opposite = both.at(-both.strength)
    assert plain_loss(llama, UNWANTED, 0.02, opposite) < 0.8 * plain_loss(llama, UNWANTED, 0.02)
    away = find(
        llama, behavior(), "preference", split=None, direction="away", completions=UNWANTED, **QUICK
    )
    assert away.strength < 0
    assert plain_loss(llama, UNWANTED, 0.02, away) < 0.8 * plain_loss(llama, UNWANTED, 0.02)


def test_a_pair_needs_two_answers(llama: LanguageModel) -> None:
    own = llama.generate(AWAY, max_new_tokens=TOKENS + 8)
    same = [{"prompt": p, "completion": a} for p, a in zip(AWAY, own, strict=True)]
    with pytest.raises(TrimtabError, match="the model's own already"):
        find(llama, behavior(), "preference", split=None, completions=same, **QUICK)
    mixed = [*same[:3], *WANTED[3:]]
    vector = find(llama, behavior(), "preference", split=None, completions=mixed, **QUICK)
    assert vector.provenance["details"]["wanted"]["toward"] == {"given": 8, "without a pair": 3}


def test_repeatable_and_refused(llama: LanguageModel) -> None:
    def run(seed: int) -> Tensor:
        options = {**QUICK, "steps": 3, "seed": seed}
        return find(llama, behavior(), "preference", completions=WANTED, **options).directions[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    refused: Callable[..., VectorSteering] = find
    for options, said in (({"phi": -1.0}, "phi=-1.0"), ({"phi": math.nan}, "phi=nan")):
        with pytest.raises(TrimtabError) as caught:
            refused(llama, behavior(), "preference", completions=WANTED, **options)
        assert said in str(caught.value)


def test_a_window_away_from_1_sets_the_strength_inside_it(llama: LanguageModel) -> None:
    vector = find(
        llama, behavior(), "preference", split=None, completions=WANTED, strengths=(2.0, 20.0),
        init="random", init_strength=0.1, keep=0.0, **QUICK,
    )  # fmt: skip
    low, high = vector.provenance["details"]["window"]
    assert vector.strength == pytest.approx((low + high) / 2)
    assert plain_loss(llama, WANTED, 1.0, vector) < plain_loss(llama, WANTED, 1.0)


def _task(lm: LanguageModel) -> Task:
    return Task(
        lm=lm, behavior=behavior(), site="resid_post", layers=tuple(range(lm.n_layers)), active=None,
        position="last", scope=Scope.parse("all"), norms=calibrate(lm), seed=0, progress=None,
    )  # fmt: skip
