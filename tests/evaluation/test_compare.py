"""measure(): every figure against a computation by hand, and the rows that must always be there."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation import Measurement, measure
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import clopper_pearson, paired_bootstrap, two_way_bootstrap
from trimtab.steering.nulls import null_seeds, random_null
from trimtab.steering.prompt import prompt

TOKENS = planted.TOKENS


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted.language_model()


def run(lm: LanguageModel, behavior: Behavior, levers: Any = (), **more: Any) -> Measurement:
    return measure(lm, behavior, levers, **{"split": None, "max_new_tokens": TOKENS, **more})


def test_every_figure_of_a_vector_row_matches_a_computation_by_hand(lm: LanguageModel) -> None:
    behavior, vector = planted.behavior(), planted.push(lm)
    row = run(lm, behavior, [vector]).rows[1]
    away = [e.prompt for e in behavior.away]
    with vector.on(lm):
        answers = lm.generate(away, max_new_tokens=TOKENS)
    scores = [float(a.startswith("Z")) for a in answers]
    before = [float(a.startswith("Z")) for a in lm.generate(away, max_new_tokens=TOKENS)]
    assert row.scores == tuple(scores) and row.n == 8
    assert row.score == 1.0 and sum(before) < 8
    assert (row.low, row.high) == clopper_pearson(8, 8)
    assert row.gain == pytest.approx(1 - sum(before) / 8)
    assert (row.gain_low, row.gain_high) == paired_bootstrap(scores, before, 0)
    assert row.coherence == sum(len(set(a)) > 1 for a in answers) / 8
    for prompts, found in (
        ([e.prompt for e in behavior.toward], (row.damage, row.damage_p95)),
        ([e.prompt for e in behavior.neutral], (row.spill, row.spill_p95)),
    ):
        own = lm.generate(prompts, max_new_tokens=TOKENS)
        expected = summarize(Reference(lm, prompts, own).kl(vector))
        assert found == pytest.approx((expected.mean, expected.p95))
        assert expected.mean > 0
    assert row.damage_low < row.damage < row.damage_high
    assert row.alphas == {3: pytest.approx(10.0)} and row.strength == 1.0
    assert [s.after for s in row.samples] == answers


def test_the_away_side_is_the_mirror_image(lm: LanguageModel) -> None:
    behavior, vector = planted.behavior(), planted.push(lm).at(-2)
    result = run(lm, behavior, [vector], nulls=0)
    toward = [e.prompt for e in behavior.toward]
    with vector.on(lm):
        answers = lm.generate(toward, max_new_tokens=TOKENS)
    row = result.rows[1]
    assert row.sign == -1 and result.rows[0].sign == -1
    assert row.scores == tuple(float(a.startswith("Q")) for a in answers)
    assert row.score == 1.0
    away = [e.prompt for e in behavior.away]
    own = lm.generate(away, max_new_tokens=TOKENS)
    expected = summarize(Reference(lm, away, own).kl(vector))
    assert row.damage == pytest.approx(expected.mean)


def test_the_rows_that_are_always_there(lm: LanguageModel) -> None:
    behavior = planted.behavior(prompt_toward="Open with Z.")
    vector = planted.push(lm)
    result = run(lm, behavior, [vector, vector, prompt("Say Z.")], nulls=2)
    label = vector.label
    assert [row.name for row in result.rows] == [
        "baseline",
        "prompt",
        label,
        f"random control of {label}",
        f"{label} (2)",
        f"random control of {label} (2)",
        'prompt "Say Z."',
    ]
    baseline = result.row("baseline")
    assert (baseline.damage, baseline.damage_p95, baseline.spill) == (0, 0, 0)
    assert baseline.gain is None and baseline.strength is None
    assert result.row("prompt").damage > 0  # the plain prompt is measured, not assumed
    assert all(row.n == 8 and row.low <= row.score <= row.high for row in result.rows)
    assert all(row.low < row.high and row.coherence_low < row.coherence_high for row in result.rows)


def test_the_null_is_norm_matched_random_directions(lm: LanguageModel) -> None:
    behavior, vector = planted.behavior(), planted.push(lm)
    result = run(lm, behavior, [vector], nulls=3, seed=4)
    row, null = result.rows[1], result.rows[2]
    away = [e.prompt for e in behavior.away]
    grid = []
    for seed in null_seeds(4, 3):
        with random_null(vector, seed).on(lm):
            answers = lm.generate(away, max_new_tokens=TOKENS)
        grid.append([float(a.startswith("Z")) for a in answers])
    means = torch.tensor(grid, dtype=torch.float64).mean(dim=1)
    assert null.null_scores == pytest.approx(means.tolist())
    assert null.score == pytest.approx(means.mean().item())
    assert row.null_score == null.score and row.score > null.score
    assert (null.low, null.high) == two_way_bootstrap(torch.tensor(grid), 4)
    assert null.alphas == row.alphas


def test_random_nulls_differ_in_direction_alone(lm: LanguageModel) -> None:
    vector = planted.push(lm, scope="all", layers=(1, 2)).at(0.5)
    null, again = random_null(vector, 7), random_null(vector, 7)
    assert (null.alphas, null.scope, null.layers) == (vector.alphas, vector.scope, vector.layers)
    for layer, c in null.directions.items():
        assert c.norm().item() == pytest.approx(1.0, abs=1e-6)
        assert torch.equal(c, again.directions[layer])
        assert abs(float(c @ vector.directions[layer])) < 0.7
    other_layers = random_null(vector.select(layers=(2,)), 7)
    assert torch.equal(other_layers.directions[2], null.directions[2])
    assert not torch.equal(random_null(vector, 8).directions[2], null.directions[2])
    assert len(set(null_seeds(0, 5) + null_seeds(1, 5))) == 10


def test_prompts_have_no_random_null_and_say_so(lm: LanguageModel) -> None:
    result = run(lm, planted.behavior(), [prompt("Say Z.")])
    row = result.rows[-1]
    assert row.null_score is None and row.null_scores == ()
    assert not any(r.kind == "null" for r in result.rows)
    assert any("no random control for prompts" in note for note in result.notes)


def test_without_neutral_prompts_there_is_no_spill_and_it_says_so(lm: LanguageModel) -> None:
    result = run(lm, planted.behavior(neutral=()), [planted.push(lm)], nulls=1)
    assert all(row.spill is None and row.spill_p95 is None for row in result.rows)
    assert any("no spill" in note for note in result.notes)
    assert any("no prompt_toward" in note for note in result.notes)
    assert "no spill" in str(result)


def test_requests_are_scored_where_there_are_any(lm: LanguageModel) -> None:
    behavior = planted.behavior(requests=["Tell me.", "What is new?", "Why?"])
    result = run(lm, behavior, [planted.push(lm)], nulls=0)
    assert [s.prompt for s in result.rows[1].samples] == ["Tell me.", "What is new?", "Why?"]
    assert any("plain requests" in note for note in result.notes)


def test_vectors_of_both_signs_give_a_baseline_each(lm: LanguageModel) -> None:
    vector = planted.push(lm)
    levers = [vector, vector.at(-1), prompt("Say Z.")]
    result = run(lm, planted.behavior(), levers, nulls=0)
    assert [(row.kind, row.sign) for row in result.rows] == [
        ("baseline", 1),
        ("vector", 1),
        ("lever", 1),
        ("baseline", -1),
        ("vector", -1),
        ("lever", -1),
    ]
    forced = run(lm, planted.behavior(), levers, nulls=0, direction="away")
    assert [row.sign for row in forced.rows] == [-1] * 4


def test_a_checkpoint_is_measured_like_a_lever(lm: LanguageModel) -> None:
    same = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)
    result = run(lm, planted.behavior(), checkpoint=same)
    row = result.row("checkpoint")
    assert row.damage == 0 and row.spill == 0
    assert row.scores == result.row("baseline").scores
    with torch.no_grad():
        same.model.get_parameter("lm_head.weight").mul_(1.5)
    moved = run(lm, planted.behavior(), checkpoint=same).row("checkpoint")
    assert moved.damage > 0.01


def test_only_the_named_split_is_used(lm: LanguageModel) -> None:
    behavior = planted.behavior(10)
    result = run(lm, behavior, split="test", seed=3)
    test = behavior.split(seed=3).test
    assert [s.prompt for s in result.rows[0].samples] == [e.prompt for e in test.away]
    assert len(test.away) < 10
    with pytest.raises(TrimtabError, match="validation"):
        run(lm, behavior, split="dev")


def test_unsteered_answers_are_generated_once(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    generate = LanguageModel.generate

    def counted(self: LanguageModel, prompts: list[str], **more: Any) -> object:
        calls.append(len(prompts))
        return generate(self, prompts, **more)

    monkeypatch.setattr(LanguageModel, "generate", counted)
    vector = planted.push(lm)
    run(lm, planted.behavior(), [vector, vector.at(2), vector.at(3)], nulls=1)
    assert sorted(calls) == [3] + [8] * (2 + 3 + 3)  # three unsteered sides, levers, nulls


def test_max_prompts_caps_every_side(lm: LanguageModel) -> None:
    result = run(lm, planted.behavior(), [planted.push(lm)], nulls=1, max_prompts=2)
    assert {row.n for row in result.rows} == {2}
    with pytest.raises(TrimtabError, match="below 1"):
        run(lm, planted.behavior(), max_prompts=0)


def test_progress_counts_every_row_and_null(lm: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    run(
        lm,
        planted.behavior(),
        [planted.push(lm)],
        nulls=2,
        max_prompts=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_collapse_is_named_in_the_table(lm: LanguageModel) -> None:
    result = run(lm, planted.behavior(), [planted.push(lm, scope="all")], nulls=0)
    assert result.rows[1].score == 1.0 and result.rows[1].coherence == 0.0
    assert "COLLAPSE" in str(result)
    assert "COLLAPSE" not in str(run(lm, planted.behavior(), [planted.push(lm)], nulls=0))


def test_differences_of_rows_are_paired(lm: LanguageModel) -> None:
    vector = planted.push(lm)
    result = run(lm, planted.behavior(), [vector], nulls=1)
    mean, low, high = result.difference(vector.label, "baseline")
    assert (mean, low, high) == (result.rows[1].gain, result.rows[1].gain_low, high)
    assert low < mean <= high
    with pytest.raises(TrimtabError, match="baseline"):
        result.row("nothing")


def test_results_print_save_and_escape(lm: LanguageModel, tmp_path: Path) -> None:
    behavior = planted.behavior(toward=["<b>Say</b> a", "b", "c"], away=["<i>d</i>", "e", "f"])
    result = run(lm, behavior, [planted.push(lm)], nulls=1)
    page = result._repr_html_()
    assert "<i>" not in page and "&lt;i&gt;d&lt;/i&gt;" in page
    saved = json.loads(result.save(tmp_path / "m.json").read_text(encoding="utf-8"))
    assert saved["rows"][1]["score"] == result.rows[1].score
    assert saved["rows"][1]["alphas"] == {"3": pytest.approx(10.0)}
    assert saved["fingerprint"] == lm.fingerprint and saved["data_hash"] == behavior.data_hash
    assert "random" in str(result)


def test_messages_are_prompts_too(lm: LanguageModel) -> None:
    talk = [{"role": "system", "content": "Talk."}, {"role": "user", "content": "Why?"}]
    behavior = planted.behavior(away=[talk, "e", "f"])
    result = run(lm, behavior, [planted.push(lm)], nulls=0)
    assert result.rows[1].samples[0].prompt == talk
    assert "user: Why?" in result.samples_table().to_text(200)


def test_the_model_is_left_as_it_was(lm: LanguageModel) -> None:
    before = lm.next_logits(["Why?"])
    run(lm, planted.behavior(prompt_toward="Z"), [planted.push(lm)], nulls=1)
    assert torch.equal(before, lm.next_logits(["Why?"]))
    assert lm.system is None
