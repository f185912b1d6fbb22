"""Dimension effects, sparse vectors and their curve, against plain arithmetic and a planted lever."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import planted
from trimtab import cli
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.mechanism.case import Case
from trimtab.mechanism.circuits.teacher_forced import TokenRuns, token_runs
from trimtab.mechanism.sparse.curve import sparsity_curve
from trimtab.mechanism.sparse.dimensions import (
    changes,
    dimension_effects,
    dimension_scores,
    kept_dimensions,
    whole_effect,
)
from trimtab.mechanism.sparse.sparsify import masked, sparsify
from trimtab.models.model import LanguageModel
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering

PROMPTS = [f"How do I find the {word}?" for word in planted.WORDS[:4]]


def random_vector(lm: LanguageModel, scope: str = "all", layers: tuple[int, ...] = (1, 2)):
    """A push that is large against the stream, so that greedy tokens change."""
    generator = torch.Generator().manual_seed(0)
    draws = {x: torch.randn(lm.d_model, generator=generator, dtype=torch.float64) for x in layers}
    return VectorSteering.from_directions(lm, draws, alpha=0.4, scope=scope)


def runs_of(lm: LanguageModel, vector: VectorSteering) -> TokenRuns:
    return token_runs(lm, vector, PROMPTS, "steered", 4)


def test_effects_divide_up_the_whole(lm: LanguageModel) -> None:
    """On every architecture, several layers pooled; for both signs of the strength."""
    for m in (1.0, -1.0):
        run = runs_of(lm, random_vector(lm).at(m))
        effects = dimension_effects(lm, [run], steps=40)
        whole = whole_effect(lm, [run])
        assert abs(whole) > 1e-3
        # A router's choice of experts is a jump, which no gradient sees.
        share = 0.15 if "mixtral" in lm.name else 0.03
        assert sum(float(e.sum()) for e in effects.values()) == pytest.approx(
            whole, rel=share, abs=2e-3
        )


@pytest.mark.parametrize("scope", ["all", "last", "post_instruction", "[0,3)"])
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_an_effect_is_the_slope_at_the_midpoint(
    llama: LanguageModel, scope: str, site: str
) -> None:
    vector = random_vector(llama, scope, layers=(1,)).select(site=site)
    vector = vector.at(4.0) if scope == "[0,3)" else vector
    run = runs_of(llama, vector)
    effects = dimension_effects(llama, [run], steps=1)
    s = changes(vector)[1]
    for i in (0, 7):
        values = []
        for bump in (1e-2, -1e-2):
            moved = 0.5 * s + bump * torch.eye(32)[i]
            probe = VectorSteering.from_directions(llama, {1: moved}, scope=scope, site=site)
            total = 0.0
            for batch, targets in run.batches(llama):
                with torch.no_grad(), probe.on(llama):
                    logits = llama.forward(batch, logits_to_keep=targets.keep)
                total += float(targets.metric(logits).sum())
            values.append(total / len(run.encoded))
        slope = (values[0] - values[1]) / 2e-2
        assert float(effects[1][i]) == pytest.approx(slope * float(s[i]), rel=0.03, abs=1e-5)


def test_samples_of_all_sets_count_alike(llama: LanguageModel) -> None:
    run = runs_of(llama, random_vector(llama))
    one, rest = run.subset([0]), run.subset(range(1, len(run.encoded)))
    apart = [dimension_effects(llama, [part], steps=2) for part in (one, rest)]
    both = dimension_effects(llama, [one, rest], steps=2)
    n = len(run.encoded)
    for layer in both:
        expected = (apart[0][layer] + (n - 1) * apart[1][layer]) / n
        assert torch.allclose(both[layer], expected, atol=1e-5)
    assert all(p.requires_grad for p in llama.model.parameters())


def test_masked_keeps_what_it_says(llama: LanguageModel, tmp_path: Path) -> None:
    vector = random_vector(llama, layers=(1, 2)).at(-1.5)
    dense = changes(vector)
    kept = {1: torch.arange(32) < 5, 2: torch.arange(32) == 9}
    raw = masked(vector, kept, restore_norm=False)
    for layer, s in changes(raw).items():
        assert torch.allclose(s, dense[layer] * kept[layer], atol=1e-6)
    assert raw.strength == -1.5
    restored = masked(vector, kept)
    lengths = [sum(float(s.norm() ** 2) for s in changes(v).values()) for v in (vector, restored)]
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-5)
    # one factor for all layers: their shares stay
    ratio = changes(restored)[1].norm() / changes(restored)[2].norm()
    assert float(ratio) == pytest.approx(float(changes(raw)[1].norm() / changes(raw)[2].norm()))
    record = restored.provenance["sparsified"]
    assert record["dimensions"] == {"1": 5, "2": 1} and record["restore_norm"] is True
    part, whole = (torch.cat([changes(v)[x].double() for x in (1, 2)]) for v in (restored, vector))
    assert record["cosine"] == pytest.approx(
        float(nn.functional.cosine_similarity(part, whole, dim=0)), rel=1e-5
    )
    alone = masked(vector, {1: torch.zeros(32, dtype=torch.bool), 2: kept[2]})
    assert alone.layers == (2,)
    everything = {layer: torch.ones(32, dtype=torch.bool) for layer in (1, 2)}
    same = masked(vector, everything)
    assert all(torch.allclose(changes(same)[x], dense[x], rtol=1e-6) for x in (1, 2))
    path = restored.save(tmp_path / "sparse.safetensors")
    again = load_steering(path)
    assert again.provenance["sparsified"] == record
    assert again.save(tmp_path / "again").read_bytes() == path.read_bytes()


def test_orders(llama: LanguageModel) -> None:
    vector = random_vector(llama, layers=(1, 2))
    generator = torch.Generator().manual_seed(3)
    effects = {x: torch.randn(32, generator=generator) for x in (1, 2)}
    s = changes(vector)

    def kept(order: str, share: float = 0.25, seed: int = 0) -> Tensor:
        chosen = kept_dimensions(dimension_scores(vector, effects, order, seed), share)
        return torch.cat([chosen[1], chosen[2]])

    e, v = torch.cat([effects[1], effects[2]]), torch.cat([s[1], s[2]])
    assert all(int(kept(order).sum()) == 16 for order in ("attribution", "magnitude", "random"))
    assert float(e[kept("attribution")].min()) > float(e[~kept("attribution")].max())
    assert float(e[kept("bottom")].max()) < float(e[~kept("bottom")].min())
    assert float(v[kept("magnitude")].abs().min()) > float(v[~kept("magnitude")].abs().max())
    # the source's rule: |unit effect| >= tau |unit vector|, at the tau that leaves as many
    ratio = (e / e.norm()).abs() / (v / v.norm()).abs()
    tau = float(ratio.sort(descending=True).values[15])
    assert torch.equal(kept("slope"), ratio >= tau)
    assert not torch.equal(kept("random"), kept("random", seed=1))
    assert int(kept("attribution", 0.001).sum()) == 1


def test_dimensions_that_nobody_reads_are_dropped_first() -> None:
    """At the last layer a dimension that the unembedding ignores can do no good."""
    lm = planted.language_model()
    read = torch.arange(32) % 2 == 0
    with torch.no_grad():
        lm.model.get_parameter("lm_head.weight")[:, ~read] = 0
    aim = planted.push(lm, scope="last").directions[3]
    # The ignored dimensions are pushed hardest: magnitude would keep them.
    vector = VectorSteering.from_directions(
        lm, {3: torch.where(read, 10 * aim, torch.tensor(4.0))}, scope="last"
    )
    run = token_runs(lm, vector, PROMPTS, "steered", 1)
    effects = dimension_effects(lm, [run])
    kept = kept_dimensions(dimension_scores(vector, effects, "attribution"), 0.2)[3]
    assert not bool((kept & ~read).any())
    largest = kept_dimensions(dimension_scores(vector, effects, "magnitude"), 0.2)[3]
    assert int((largest & ~read).sum()) >= 4


def test_curve() -> None:
    lm = planted.language_model()
    given = planted.behavior(n=10)
    vector = planted.push(lm, scope="last")
    case = Case(lm, given, vector, max_new_tokens=planted.TOKENS)
    orders = ("attribution", "random", "bottom")
    curve = sparsity_curve(case, (1.0, 0.5, 0.1), orders, steps=4, effect_prompts=4)
    assert curve.completeness == pytest.approx(1.0, abs=0.1)
    point = {(p.order, p.share, p.sign, p.restored): p for p in curve.points}
    assert len(point) == 3 * 3 * 2 * 2
    toward = next(p for p in curve.dense if p.sign == 1)
    assert toward.score > curve.unsteered[1] and toward.score == 1.0
    for order in ("attribution", "random", "bottom"):
        whole = point[order, 1.0, 1, True]
        assert (whole.score, whole.dimensions) == (toward.score, 32)
        assert whole.cosine == pytest.approx(1.0, abs=1e-5)
    best, worst = point["attribution", 0.5, 1, True], point["bottom", 0.5, 1, True]
    assert best.score > worst.score and best.dimensions == worst.dimensions == 16
    assert best.low <= best.score <= best.high
    assert curve.least("attribution", 1, True) in (0.5, 0.1)
    assert curve.least("bottom", 1, True) == 1.0
    assert "toward, raw" in str(curve) and curve.to_dict()["points"]
    assert curve.strengths == {1: 1.0, -1: -1.0}


def test_sparsify_reads_effects_on_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = planted.language_model(), planted.behavior(n=10)
    seen: list[object] = []
    encode = lm.encode

    def spy(prompt: object, *rest: object) -> object:
        seen.append(prompt)
        return encode(prompt, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(lm, "encode", spy)
    vector = planted.push(lm, scope="last")
    sparse = sparsify(Case(lm, given, vector, max_new_tokens=3), 0.5, steps=2)
    splits = given.split(0)
    train = {e.prompt for e in (*splits.train.toward, *splits.train.away)}
    assert seen and set(seen) <= train
    assert sparse.strength == vector.strength and type(sparse) is VectorSteering
    assert sparse.provenance["sparsified"]["keep"] == 0.5
    assert int((sparse.directions[3] != 0).sum()) == 16
    plain = sparsify(Case(lm, given, vector), 0.5, order="magnitude")
    assert float(plain.directions[3].abs()[plain.directions[3] != 0].min()) >= float(
        vector.directions[3].abs().median()
    )


def test_refusals(llama: LanguageModel) -> None:
    given = planted.behavior()
    vector = random_vector(llama)
    cases = [
        (vector.select(operation="ablate"), {}, "ablate"),
        (vector.at(0.0), {}, "strength 0"),
        (vector, {"keep": 0.0}, "share of 0.0"),
        (vector, {"keep": 1.5}, "share of 1.5"),
        (vector, {"order": "best"}, "best"),
        (vector.at(1e-6), {"keep": 0.5}, "stronger"),
    ]
    for steering, options, said in cases:
        with pytest.raises(TrimtabError) as caught:
            sparsify(Case(llama, given, steering, max_prompts=2), **{"steps": 1, **options})
        assert said in str(caught.value), said


def unsaid(lm: LanguageModel) -> Behavior:
    """Prompts whose unsteered answers are not on the wanted side by themselves."""
    words = [f"{kind} {word}" for kind in ("old", "new", "red", "big") for word in planted.WORDS]

    def kept(text: str, letter: str) -> list[str]:
        listed = [text.format(word) for word in words]
        answers = lm.generate(listed, max_new_tokens=1)
        return [p for p, a in zip(listed, answers, strict=True) if not a.startswith(letter)][:32]

    return planted.behavior(
        toward=kept("Say something about the {}.", "Q"),
        away=kept("How do I find the {}?", "Z"),
        readout={"toward": ["Z"], "away": ["Q"]},
    )


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    hook = sys.excepthook
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    sys.excepthook = hook
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_the_commands_write_the_sparse_vector(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lm = planted.language_model()
    model, file, dense = tmp_path / "model", tmp_path / "b.yaml", tmp_path / "dense.safetensors"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    content = unsaid(lm).to_dict()
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    planted.push(lm, scope="last").save(dense)
    out = tmp_path / "sparse.safetensors"
    options = ("-o", out, "--layers", "3", "--strength", "20", "--sparsify", "0.25")
    code, _, err = _run(capsys, "find", model, file, *options)
    assert code == 0, err
    found = load_steering(out)
    assert isinstance(found, VectorSteering) and found.strength == 20
    assert int((found.directions[3] != 0).sum()) == 8
    assert found.provenance["sparsified"]["keep"] == 0.25
    assert found.provenance["method"] == "mean_difference"

    tuning = ("--sparsify", "0.5", "--budget", "20", "--coherence-floor", "0", "--layers", "3")
    wide = ("--scope", "last", "--max-new-tokens", "3", "-o", out)
    code, said, err = _run(capsys, "tune", model, file, dense, *tuning, *wide)
    assert code == 0, err
    tuned = load_steering(out)
    assert isinstance(tuned, VectorSteering)
    assert int((tuned.directions[3] != 0).sum()) == 16 and tuned.layers == (3,)
    record = tuned.provenance
    assert record["sparsified"]["signs"] == [1] and record["tuned"]["score"] > 0.5

    before = out.read_bytes()
    code, _, err = _run(capsys, "find", model, file, "-o", out, "--sparsify", "2")
    assert code == 2 and "outside (0, 1]" in err and out.read_bytes() == before
