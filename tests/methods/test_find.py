"""The ways to find a vector, each against a plain re-computation in torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import tiny
from conftest import tiny_model
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import JUDGES, Judge, Verdict, register_judge
from trimtab.methods import METHODS, Found, Task, find, read_contrast, register, training
from trimtab.methods.pca import main_direction
from trimtab.methods.probe import fit
from trimtab.methods.wanted import own_answers, wanted_answers
from trimtab.models.chat import Encoded
from trimtab.models.model import LanguageModel
from trimtab.steering.load import load_steering
from trimtab.steering.norms import calibrate
from trimtab.steering.scope import Scope
from trimtab.steering.vector import VectorSteering

THINGS = ("ferry", "cats", "ledger", "pier", "harbor", "noon", "rules", "work")
TOWARD = [f"Please talk about the {thing}, thank you." for thing in THINGS]
AWAY = [f"How do I borrow {thing} today?" for thing in THINGS]
WANTED = [{"prompt": prompt, "completion": "Sure, sleep."} for prompt in AWAY]
UNWANTED = [{"prompt": prompt, "completion": "I am sorry."} for prompt in TOWARD]
QUICK = {"steps": 12, "learning_rate": 0.1, "max_completion_tokens": 4}


def behavior(**more: object) -> Behavior:
    return Behavior(**{"name": "polite", "toward": TOWARD, "away": AWAY, **more})


def residual(lm: LanguageModel, encoded: Encoded, layer: int) -> Tensor:
    """What Hugging Face itself says leaves a block (not the last one), float64 `[seq, d]`."""
    with torch.no_grad():
        output = lm.model(input_ids=torch.tensor([encoded.ids]), output_hidden_states=True)
    return output.hidden_states[layer + 1][0].double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


# Mean difference


def test_mean_difference_is_the_plain_loop(lm: LanguageModel) -> None:
    vector = find(lm, behavior(), split=None)
    norms = calibrate(lm)
    assert vector.layers == (1, 2) and vector.strength == 1.0 and str(vector.scope) == "last"
    for layer in range(lm.n_layers - 1):
        sides = [
            torch.stack([residual(lm, lm.encode(p), layer)[-1] for p in prompts])
            for prompts in (TOWARD, AWAY)
        ]
        difference = sides[0].mean(0) - sides[1].mean(0)
        assert cosine(vector.directions[layer], difference) > 1 - 1e-6
        assert vector.class_gaps[layer] == pytest.approx(float(difference.norm()), rel=1e-4)
        along = torch.cat(sides) @ (difference / difference.norm())
        assert vector.spreads[layer] == pytest.approx(float(along.std(correction=0)), rel=1e-3)
        assert vector.scales[layer] == pytest.approx(norms.mean[layer] / math.sqrt(lm.d_model))
    assert vector.provenance["read_at"] == "prompt[-1]"
    assert vector.provenance["added_at"] == "last"
    assert vector.provenance["data_hash"] == behavior().data_hash
    assert vector.fingerprint == lm.fingerprint


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_other_readings_point_toward(lm: LanguageModel, method: str) -> None:
    vector = find(lm, behavior(), method)
    assert set(vector.directions) == set(range(lm.n_layers))
    assert all(gap > 0 for gap in vector.class_gaps.values())
    details = vector.provenance["details"]
    shares = details["explained" if method == "pca" else "train_accuracy"]
    assert all(0 < share <= 1 + 1e-9 for share in shares.values()) and len(shares) == 4


def test_only_the_split_is_used(llama: LanguageModel) -> None:
    full = behavior()
    train = full.split(5).train
    chosen = find(llama, full, seed=5)
    alone = find(llama, train, split=None)
    assert all(torch.equal(chosen.directions[x], alone.directions[x]) for x in range(4))
    assert not torch.equal(chosen.directions[1], find(llama, full, seed=6).directions[1])
    assert chosen.provenance["examples"] == {"toward": 4, "away": 4}
    with pytest.raises(TrimtabError, match="split=None"):
        find(llama, Behavior("few", TOWARD[:2], AWAY[:2]))


def test_positions(llama: LanguageModel) -> None:
    def plain(reading) -> Tensor:
        means = [torch.stack([reading(llama.encode(p)) for p in s]).mean(0) for s in (TOWARD, AWAY)]
        return means[0] - means[1]

    def found(position: str | int, **more: object) -> VectorSteering:
        return find(llama, behavior(**more), position=position, split=None)

    vector = found(-3)
    assert cosine(vector.directions[1], plain(lambda e: residual(llama, e, 1)[-3])) > 1 - 1e-6
    assert vector.provenance["read_at"] == "prompt[-3]"
    vector = found("post_instruction")
    expected = plain(lambda e: residual(llama, e, 1)[e.instruction_end : e.prompt_length].mean(0))
    assert cosine(vector.directions[1], expected) > 1 - 1e-6
    assert str(vector.scope) == "post_instruction" == vector.provenance["added_at"]
    assert str(find(llama, behavior(), position=-1, scope="[0,3)").scope) == "[0,3)"


def test_answer_position_takes_given_and_own_answers(llama: LanguageModel) -> None:
    away = [{"prompt": p, "completion": "The cats sleep."} for p in AWAY]
    vector = find(llama, behavior(away=away), position="answer", split=None)
    own = llama.generate(TOWARD, max_new_tokens=32)
    means = []
    for prompts, answers in ((TOWARD, own), (AWAY, ["The cats sleep."] * len(AWAY))):
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            encoded = llama.encode(prompt, answer)
            stop = encoded.completion_end
            rows.append(residual(llama, encoded, 1)[encoded.prompt_length : stop].mean(0))
        means.append(torch.stack(rows).mean(0))
    assert cosine(vector.directions[1], means[0] - means[1]) > 1 - 1e-6
    assert vector.provenance["read_at"] == "mean over the answer (8 given, 8 the model's own)"
    assert str(vector.scope) == "generated"


def test_judged_answers_are_read_after_the_same_prompt(llama: LanguageModel) -> None:
    shown = llama.generate(TOWARD, max_new_tokens=40)
    good = set(shown[::2])

    @register_judge("every_second")
    def every_second(behavior: Behavior, options: object) -> Judge:
        return lambda prompts, answers: [Verdict(float(a in good), 0.0) for a in answers]

    try:
        vector = find(llama, behavior(judge="every_second"), position="judged_answer", split=None)
        with pytest.raises(TrimtabError, match="not paired"):
            find(llama, behavior(paired=False, judge="every_second"), position="judged_answer")
        good.clear()
        with pytest.raises(TrimtabError, match="none of them toward"):
            find(llama, behavior(judge="every_second"), position="judged_answer", split=None)
    finally:
        del JUDGES["every_second"]
    own = llama.generate(AWAY, max_new_tokens=32)
    rows = []
    for i in [i for i, answer in enumerate(shown) if answer in set(shown[::2])]:
        read = []
        for answer in (shown[i], own[i]):
            encoded = llama.encode(AWAY[i], answer)
            start = encoded.prompt_length
            stop = min(encoded.completion_end or 0, start + 32)
            read.append(residual(llama, encoded, 1)[start:stop].mean(0))
        if shown[i] != own[i]:
            rows.append(read[0] - read[1])
    assert rows and cosine(vector.directions[1], torch.stack(rows).mean(0)) > 1 - 1e-6
    read_at = vector.provenance["read_at"]
    assert read_at == f"mean over the answer, judged, after the same prompt ({len(rows)} of 8 pairs)"
    assert str(vector.scope) == "generated"


def test_k_positions_choose_the_one_that_tells_most(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 4, 5, 32, generator=generator)
    values[:8, :, 1] += 4.0  # the fourth from the end
    module = sys.modules["trimtab.methods.contrast"]  # `trimtab.methods` may be the function
    monkeypatch.setattr(module, "capture", lambda *a, **k: values)
    vector = find(llama, behavior(), position=5, split=None)
    assert vector.provenance["read_at"] == "prompt[-4]"
    difference = values[:8, 1, 1].mean(0) - values[8:, 1, 1].mean(0)
    assert cosine(vector.directions[1], difference) > 1 - 1e-6


def test_layers_where_nothing_differs_are_left_out(llama: LanguageModel) -> None:
    vector = find(llama, behavior(), site="resid_pre")  # the template's last token, embedded
    assert set(vector.directions) == {1, 2, 3}
    for method in ("mean_difference", "pca", "probe"):
        with pytest.raises(TrimtabError, match="cannot be told apart"):
            find(llama, behavior(), method, site="resid_pre", layers=[0])
        with pytest.raises(TrimtabError, match="cannot be told apart"):
            find(llama, behavior(), method, site="embed")
    with pytest.raises(TrimtabError, match="cannot be told apart"):
        find(llama, behavior(), "next_token", site="embed", completions=WANTED)


# PCA


def test_pca_does_not_center() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2, 40, 12, generator=generator, dtype=torch.float64)
    noise[0, :, 1] += 2 * torch.randn(40, generator=generator)  # the pairs disagree along axis 1
    toward, away = noise[0], noise[1].clone()
    toward[:, 0] += 3.0
    mean = toward.mean(0) - away.mean(0)
    for paired in (True, False):
        direction, share = main_direction(toward, away, paired)
        assert cosine(direction, mean) > 0.95 and float(direction[0]) > 0.95
        rows = toward - away
        assert abs(float(torch.linalg.svd(rows - rows.mean(0)).Vh[0, 0])) < 0.3  # the trap
        back, _ = main_direction(away, toward, paired)
        assert torch.allclose(back, -direction, atol=1e-10)
        assert 0.4 < share < 0.9
    rows = toward - away
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    direction, share = main_direction(toward, away, True)
    assert abs(cosine(direction, vectors[:, -1])) > 1 - 1e-10
    assert share == pytest.approx(float(values[-1] / values.sum()))


# Probe


def planted(seed: int, n: int, d: int = 30) -> tuple[Tensor, Tensor]:
    """Sides that differ along a direction hidden under a louder one; a dead feature, an offset."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n, d, generator=generator, dtype=torch.float64)
    rows[:, 0] *= 100.0
    rows[:, 1] = 7.0
    rows[:, 2] *= 0.01
    rows[:n, 2] += 0.05
    rows[n:, 2] -= 0.05
    return rows[:n] + 5, rows[n:] + 5


@pytest.mark.parametrize(("n", "floor"), [(12, 0.75), (100, 0.95)])
def test_probe_separates_held_out_data_at_the_optimum(n: int, floor: float) -> None:
    toward, away = planted(0, n)
    weights, bias = fit(toward, away, l2=0.5)
    more = planted(1, 200)
    right = [(side @ weights + bias > 0).double().mean() for side in more]
    assert right[0] > floor and right[1] < 1 - floor
    assert abs(float(weights[1])) < 1e-12
    again, _ = fit(toward, away, l2=0.5)
    assert torch.equal(weights, again)
    # the gradient of the objective, written out on standardized features, is zero there
    rows = torch.cat([toward, away])
    std = rows.std(0, correction=0)
    alive = std > 0
    z = (rows[:, alive] - rows[:, alive].mean(0)) / std[alive]
    w = (weights[alive] * std[alive]).requires_grad_(True)
    b = (bias + rows.mean(0) @ weights).detach().requires_grad_(True)
    y = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    loss = torch.log1p(torch.exp(-y * (z @ w + b))).sum() + 0.25 * w.square().sum()
    gradients = torch.autograd.grad(loss, (w, b))
    assert float(gradients[0].norm()) < 1e-5 and abs(float(gradients[1])) < 1e-5


# Next token


def mean_loss(
    lm: LanguageModel, answers: Sequence[dict], tokens: int, steering: VectorSteering | None = None
) -> float:
    """Mean loss of the first tokens of the answers, one unpadded row at a time."""
    total, count = 0.0, 0
    for item in answers:
        encoded = lm.encode(item["prompt"], item["completion"])
        ids = torch.tensor([encoded.ids[: encoded.prompt_length + tokens]])
        with torch.no_grad():
            if steering is None:
                logits = lm.model(input_ids=ids).logits
            else:
                with steering.on(lm):
                    logits = lm.model(input_ids=ids).logits
        losses = nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")
        total += float(losses[encoded.prompt_length - 1 :].sum())
        count += ids.shape[1] - encoded.prompt_length
    return total / count


def test_next_token_lowers_the_loss_and_touches_nothing(lm: LanguageModel) -> None:
    parameters = list(lm.model.parameters())
    flags = [i % 2 == 0 for i in range(len(parameters))]
    before = [p.detach().clone() for p in parameters]
    hooks = [len(m._forward_hooks) for m in lm.model.modules()]
    try:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        with torch.no_grad():  # a caller's no_grad is no obstacle
            vector = find(lm, behavior(), "next_token", split=None, completions=WANTED, **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        assert [p.requires_grad for p in parameters] == flags
        assert all(p.grad is None for p in parameters)
        assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
        assert [len(m._forward_hooks) for m in lm.model.modules()] == hooks
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    assert vector.layers == (0,) and str(vector.scope) == "all" and vector.strength > 0
    details = vector.provenance["details"]
    unsteered, steered = mean_loss(lm, WANTED, 4), mean_loss(lm, WANTED, 4, vector)
    assert details["loss_unsteered"] == pytest.approx(unsteered, rel=1e-4)
    assert details["loss_trained"] == pytest.approx(steered, rel=1e-3)
    assert steered < unsteered - 0.3
    norm = calibrate(lm).mean[0] / math.sqrt(lm.d_model)
    assert vector.alphas[0] == pytest.approx(vector.strength * norm)


@pytest.mark.parametrize("scope", ["last", "generated", "post_instruction", "[0,4)"])
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_next_token_trains_in_the_scope_it_is_used_in(
    llama: LanguageModel, scope: str, site: str
) -> None:
    options = {**QUICK, "learning_rate": 0.2}
    vector = find(
        llama,
        behavior(),
        "next_token",
        scope=scope,
        site=site,
        layers=1,
        split=None,
        completions=WANTED,
        init="random",
        **options,
    )
    assert str(vector.scope) == scope and vector.layers == (1,) and vector.site == site
    details = vector.provenance["details"]
    assert details["loss_trained"] < details["loss_unsteered"]


def test_the_training_gradient_is_the_plain_one(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REFERENCE_TOKENS", 10_000)  # the exact KL
    wanted = tuple(llama.encode(x["prompt"], x["completion"]) for x in WANTED[:3])
    kept = tuple(llama.encode(x["prompt"], x["completion"]) for x in UNWANTED[:2])
    task = _task(llama, behavior())
    scale = 0.7
    trainer = training.Trainer(task, 1, scale, [training.Rows(-1, wanted, kept)], keep=0.4)
    w = torch.randn(32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    factors = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5])
    rows = training.Rows(-1, wanted, kept)
    got = trainer._gradient(w, rows, [0, 1, 2], [0, 1], factors)

    def logits(encoded: Encoded, amount: float) -> Tensor:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + amount * scale * w

        handle = llama.model.get_submodule("model.layers.1").register_forward_hook(add)
        try:
            out = llama.model(input_ids=torch.tensor([encoded.ids])).logits[0]
        finally:
            handle.remove()
        return out[encoded.prompt_length - 1 : -1]

    nll, kl = torch.zeros(()), torch.zeros(())
    counts = [0, 0]
    for encoded, factor in zip(wanted, factors[:3].tolist(), strict=True):
        targets = torch.tensor(encoded.ids[encoded.prompt_length :])
        nll = nll + nn.functional.cross_entropy(logits(encoded, -factor), targets, reduction="sum")
        counts[0] += len(targets)
    for encoded, factor in zip(kept, factors[3:].tolist(), strict=True):
        p = logits(encoded, 0.0).detach().log_softmax(-1)
        q = logits(encoded, -factor).log_softmax(-1)
        kl = kl + (p.exp() * (p - q)).sum()
        counts[1] += len(p)
    loss = nll / counts[0] + 0.4 * kl / counts[1]
    expected = torch.autograd.grad(loss, w)[0]
    assert float(expected.norm()) > 1e-3
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_both_signs_and_the_other_sign(llama: LanguageModel) -> None:
    both = find(
        llama,
        behavior(),
        "next_token",
        split=None,
        direction="both",
        completions=[*WANTED, *UNWANTED],
        **{**QUICK, "steps": 30},
    )
    assert both.strength > 0
    assert mean_loss(llama, WANTED, 4, both) < mean_loss(llama, WANTED, 4) - 0.2
    opposite = both.at(-both.strength)
    assert mean_loss(llama, UNWANTED, 4, opposite) < mean_loss(llama, UNWANTED, 4) - 0.2
    away = find(
        llama, behavior(), "next_token", split=None, direction="away", completions=UNWANTED, **QUICK
    )
    assert away.strength < 0
    assert mean_loss(llama, UNWANTED, 4, away) < mean_loss(llama, UNWANTED, 4) - 0.2
    # it started from a vector that points toward; nothing else is asked of it on that side
    start = find(
        llama,
        behavior(),
        "next_token",
        split=None,
        direction="away",
        completions=UNWANTED,
        **{**QUICK, "learning_rate": 1e-9},
    )
    assert start.class_gaps[0] > 0 and start.strength == pytest.approx(-1.0)


def test_keep_lowers_the_damage(llama: LanguageModel) -> None:
    own = llama.generate(TOWARD, max_new_tokens=4)

    def damage(keep: float) -> float:
        vector = find(
            llama,
            behavior(),
            "next_token",
            split=None,
            completions=WANTED,
            keep=keep,
            **{**QUICK, "steps": 30},
        )
        total = 0.0
        for prompt, answer in zip(TOWARD, own, strict=True):
            encoded = llama.encode(prompt, answer)
            ids = torch.tensor([encoded.ids])
            with torch.no_grad():
                p = llama.model(input_ids=ids).logits[0, encoded.prompt_length - 1 : -1]
                with vector.on(llama):
                    q = llama.model(input_ids=ids).logits[0, encoded.prompt_length - 1 : -1]
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
        return total / len(TOWARD)

    assert damage(4.0) < 0.6 * damage(0.0)


def test_the_lumped_divergence_is_a_lower_bound_and_close() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(2, 7, 300, generator=generator)).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    for count, floor in ((8, 0.3), (64, 0.9), (300, 0.9999)):
        top = p.topk(count, dim=-1)
        known = [training._Reference(top.values, top.indices)]
        value = float(training._divergence(q, known))
        assert floor * exact <= value <= exact * (1 + 1e-4)


def test_repeatable(llama: LanguageModel) -> None:
    def run(seed: int) -> Tensor:
        vector = find(
            llama, behavior(), "next_token", seed=seed, completions=WANTED, **{**QUICK, "steps": 3}
        )
        return vector.directions[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


# Wanted answers


def _task(lm: LanguageModel, given: Behavior) -> Task:
    return Task(
        lm=lm,
        behavior=given,
        site="resid_post",
        layers=tuple(range(lm.n_layers)),
        active=None,
        position="last",
        scope=Scope.parse("all"),
        norms=calibrate(lm),
        seed=0,
        progress=None,
    )


def _collect(lm: LanguageModel, given: Behavior, sign: int = 1, **more: object):
    options = {"tokens": 5, "completions": None, "source": "auto", "judge": None, **more}
    return wanted_answers(_task(lm, given), sign, **options)  # pyright: ignore[reportArgumentType]


def test_where_wanted_answers_come_from(llama: LanguageModel) -> None:
    toward = [{"prompt": TOWARD[0], "completion": "Sure."}, *TOWARD[1:]]
    given = behavior(toward=toward, prompt_toward="Please be kind.", prompt_away="Sorry.")
    got = _collect(llama, given, completions=WANTED[6:])
    assert got.sources == {"given": 2, "paired completion": 1, "prompted": 5}
    assert len(got.encoded) == 8
    llama.system = "Please be kind."
    prompted = llama.generate(AWAY[1:6], max_new_tokens=13)
    llama.system = None
    expected = [
        ("Sure.", AWAY[0]),
        *zip(prompted, AWAY[1:6], strict=True),
        ("Sure, sleep.", AWAY[6]),
    ]
    for (answer, prompt), encoded in zip(expected, got.encoded, strict=False):
        whole = llama.encode(prompt, answer)  # the system prompt is for asking, not for training
        assert encoded.ids == whole.ids[: whole.prompt_length + 5]
    other = _collect(llama, given, sign=-1)
    assert other.sources == {"prompted": 8}
    assert [e.prompt_length for e in other.encoded] == [
        llama.encode(p).prompt_length for p in TOWARD
    ]


def test_the_judge_decides_which_own_answers_are_used(llama: LanguageModel) -> None:
    seen: list[list[str]] = []

    def judge(prompts: Sequence[object], answers: Sequence[str]) -> list[SimpleNamespace]:
        seen.append(list(answers))
        return [SimpleNamespace(toward=float(i < 3), away=0.0) for i in range(len(answers))]

    given = behavior(prompt_toward="Please be kind.", paired=False)
    assert _collect(llama, given, judge=judge).sources == {"prompted": 3}
    assert len(seen) == 1 and len(seen[0]) == 8
    # where pairs ask the same, the rest may come from the paired prompts
    paired = behavior(prompt_toward="Please be kind.", paired=True)
    assert _collect(llama, paired, judge=judge).sources == {"prompted": 3, "paired prompt": 3}
    assert seen[2] == llama.generate(TOWARD[3:], max_new_tokens=13)

    def never(prompts: Sequence[object], answers: Sequence[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(toward=0.4, away=0.6)] * len(answers)

    with pytest.raises(TrimtabError, match="8 own answers, none of them toward"):
        _collect(llama, given, judge=never)
    assert _collect(llama, given, judge=never, completions=WANTED).sources == {"given": 8}


def test_no_wanted_answers_says_what_to_supply(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="prompt_toward"):
        find(llama, behavior(), "next_token")
    with pytest.raises(TrimtabError, match="prompt_away"):
        find(llama, behavior(prompt_toward="Be kind."), "next_token", direction="both", **QUICK)
    with pytest.raises(TrimtabError, match="without a completion"):
        find(llama, behavior(), "next_token", completions=[AWAY[0]])
    assert _collect(llama, behavior(), source="paired").sources == {"paired prompt": 8}
    assert llama.system is None


def test_an_answer_that_was_cut_off_is_not_taught_to_end(llama: LanguageModel) -> None:
    own = own_answers(_task(llama, behavior()), behavior().toward, 3)
    end = llama.tokenizer.eos_token_id
    texts = llama.generate(TOWARD, max_new_tokens=12)
    for encoded, text in zip(own.encoded, texts, strict=True):
        if len(llama.tokenizer(text, add_special_tokens=False)["input_ids"]) > 3:
            assert end not in encoded.ids[encoded.prompt_length :]


# The registry


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "magic"}, "mean_difference, next_token, pca, preference, probe"),
        ({"method": "pca", "strength": 3}, "the option 'strength'"),
        ({"layers": [4]}, "0 to 3"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [True]}, "0 to 3"),
        ({"site": "residual"}, "resid_post"),
        ({"scope": "everywhere"}, "post_instruction"),
        ({"position": "first"}, "use last"),
        ({"position": 0}, "use last"),
        ({"position": 500}, "500"),
        ({"split": "tset"}, "train, validation, test"),
        ({"method": "probe", "l2": 0.0}, "l2"),
        ({"method": "next_token", "direction": "up"}, "toward, away or both"),
        ({"method": "next_token", "steps": 0}, "steps=0"),
        ({"method": "next_token", "strengths": (2.0, 1.0)}, "strengths=(2.0, 1.0)"),
        ({"method": "next_token", "learning_rate": math.nan}, "learning_rate=nan"),
        ({"method": "next_token", "keep": -1.0}, "keep=-1.0"),
        ({"method": "next_token", "layer": 9}, "layers 0 to 3"),
        ({"method": "next_token", "layers": [1, 2]}, "one layer"),
        ({"method": "next_token", "layers": [1], "layer": 2}, "one layer"),
        ({"method": "next_token", "init": "zero"}, "mean_difference, random"),
        ({"method": "next_token", "wanted": "some"}, "auto, prompted, paired"),
    ],
)
def test_refusals(llama: LanguageModel, arguments: dict, said: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        find(llama, behavior(), **arguments)
    assert said in str(caught.value)


def test_a_name_is_not_a_behavior(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="a str instead of a behavior"):
        find(llama, "refusal")  # pyright: ignore[reportArgumentType]


def test_a_method_of_ones_own(llama: LanguageModel) -> None:
    @register("first_pair", read_at=-1, added_at="all")
    def first_pair(task: Task, *, times: float = 1.0) -> Found:
        contrast = read_contrast(task)
        pairs = {x: contrast.toward[x][0] - contrast.away[x][0] for x in contrast.telling}
        return contrast.found({x: v * times for x, v in pairs.items()})

    try:
        vector = find(llama, behavior(), "first_pair", split=None, times=3.0, layers=2)
        first = [residual(llama, llama.encode(p[0]), 2)[-1] for p in (TOWARD, AWAY)]
        assert cosine(vector.directions[2], first[0] - first[1]) > 1 - 1e-6
        assert vector.layers == (2,) and str(vector.scope) == "all"
        assert vector.provenance["options"] == {"times": 3.0}
    finally:
        del METHODS["first_pair"]


def test_a_found_vector_survives_its_file(llama: LanguageModel, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    vector = find(
        llama,
        behavior(),
        "next_token",
        completions=WANTED,
        judge=lambda prompts, answers: [],
        progress=lambda step, steps: done.append((step, steps)),
        **QUICK,
    )
    assert done[-1] == (12, 12)
    again = load_steering(vector.save(tmp_path / "v.safetensors"))
    assert isinstance(again, VectorSteering)
    assert again.provenance == vector.provenance and again.strength == vector.strength


def test_half_precision_trains(tmp_path: Path) -> None:
    lm = tiny.language_model("llama", dtype=torch.bfloat16)
    vector = find(lm, behavior(), "next_token", split=None, completions=WANTED, **QUICK)
    details = vector.provenance["details"]
    assert details["loss_trained"] < details["loss_unsteered"] - 0.3


def test_no_chat_template_works_too() -> None:
    lm = tiny_model("llama", template=False)
    for method in ("mean_difference", "pca", "probe"):
        assert find(lm, behavior(), method).layers == (1, 2)
    with pytest.raises(TrimtabError, match="post_instruction"):
        find(lm, behavior(), position="post_instruction")
