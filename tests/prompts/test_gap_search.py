"""Gap search: both methods lower what is open, on the text a user would paste, on unseen prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import planted
import tiny
from trimtab.cli import main
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import token_kl
from trimtab.evaluation.readout import gap, readout_tokens
from trimtab.prompts.gap.gap_search import METHODS, GapSearch, HeldOut, close_gap
from trimtab.prompts.gap.readings import Reader
from trimtab.prompts.gap.sort_sum_stop import sort_sum_stop
from trimtab.prompts.gap.steps import GapStep, Grown, need
from trimtab.prompts.scoring.objective import GapLoss
from trimtab.prompts.task.constraints import Constraints
from trimtab.prompts.task.rows import lay_out
from trimtab.report.gap_section import gap_section
from trimtab.report.page import render
from trimtab.results.intervals import Interval
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering, prompt

READOUT = {"toward": ["Z", "cats"], "away": ["Q", "ferry"]}
REQUESTS = ["How do I borrow the ledger?", "Who sleeps on the pier?", "At noon?"]


@pytest.fixture(scope="module")
def behavior():
    return planted.behavior(10, readout=READOUT)


def reader(lm, sign=1, slot="suffix", aggregator="logsumexp"):
    tokens = readout_tokens(lm, planted.behavior(readout=READOUT))
    objective = GapLoss(tokens.toward, tokens.away, sign, aggregator)
    return Reader(lm, lay_out(lm, REQUESTS, slot), objective)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_readings_are_the_models(architecture):
    lm = tiny.language_model(architecture)
    found = reader(lm, slot="prefix")
    bare = gap(lm, planted.behavior(readout=READOUT), REQUESTS).double()
    assert torch.allclose(found.bare.gaps[0], bare, atol=1e-5)
    slots = [(40, 41), (42, 43, 44), ()]
    reading = found.read(slots)
    assert reading.gaps.shape == (3, 3)
    for n, slot in enumerate(slots):
        for r, row in enumerate(found.rows):
            with torch.no_grad():
                ids = torch.tensor([row.encoded(slot).ids])
                plain = torch.tensor([lm.encode(REQUESTS[r]).ids])
                log_p, before = (lm.model(x).logits[0, -1].log_softmax(-1) for x in (ids, plain))
            wanted = found.objective.gaps(log_p)
            assert float(reading.gaps[n, r]) == pytest.approx(float(wanted), abs=1e-5)
            mass = log_p[found.objective.toward].logsumexp(-1)
            assert float(reading.masses[n, r]) == pytest.approx(float(mass), abs=1e-5)
            kl = token_kl(before[None], log_p[None])
            assert float(reading.shifts[n, r]) == pytest.approx(float(kl), abs=1e-4)


def test_the_gap_is_toward_minus_away_by_either_aggregator(llama):
    logits = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    by_max = GapLoss([0, 1], [2], aggregator="max")
    assert float(by_max.gaps(logits)) == pytest.approx(-1.0)
    summed = GapLoss([0, 1], [2])
    both = torch.tensor([1.0, 2.0]).logsumexp(0)
    assert float(summed.gaps(logits)) == pytest.approx(float(both) - 3.0)


def test_what_is_open_is_the_goal_quantile():
    gaps = torch.tensor([3.0, 1.0, -1.0, -2.0])
    assert need(gaps, 0.5) == -1.0 and need(gaps, 0.75) == 1.0 and need(gaps, 1.0) == 2.0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("slot", ["prefix", "suffix"])
@pytest.mark.parametrize("method", list(METHODS))
def test_both_methods_lower_what_is_open(llama, method, slot, sign):
    found = reader(llama, sign, slot)
    rows = found.rows
    bound = Constraints().bind(llama, rows)
    result = METHODS[method](found, bound, max_tokens=4, margin=5.0)
    assert result.slot and bound.legal([result.slot]) == [True]
    after = sign * found.read([result.slot]).gaps.mean()
    assert result.gap_after == pytest.approx(float(after), abs=1e-5)
    assert result.gap_after > result.gap_before
    kept = [step for step in result.steps if step.kept]
    assert [step.token for step in kept] == list(result.slot)
    gained = result.gap_after - result.gap_before
    assert sum(step.true for step in kept) == pytest.approx(gained, abs=1e-6)
    assert result.sequences >= len(rows) and result.sequences < found.sequences


def test_sorting_alone_foretells_one_token_exactly(llama):
    found = reader(llama)
    bound = Constraints().bind(llama, found.rows)
    result = sort_sum_stop(
        found, bound, max_tokens=1, margin=5.0, shift_weight=0.0, mass_weight=0.0
    )
    step = result.steps[0]
    assert step.predicted == pytest.approx(step.true, abs=1e-6)
    # With no other terms in the score it is the best of all likely tokens.
    assert result.additivity == pytest.approx(1.0, abs=1e-5)


def test_tokens_behind_the_best_point_are_taken_away():
    steps = (GapStep(1, "a", 1.0, 2.0), GapStep(2, "b", 1.0, -1.0, kept=False))
    found = Grown("sort", (1,), steps, -1.0, 1.0, 1.0, "closed", 9)
    assert found.additivity == pytest.approx(0.5) and found.order is None
    assert "taken away" in str(found)


def test_close_gap_scores_unseen_prompts_from_the_text(llama, behavior):
    result = close_gap(llama, behavior, method="sort", max_tokens=3, nulls=2, margin=5.0)
    held = result.held_out
    assert held is not None and result.null is not None and result.null[1] == 2
    unseen = [e.prompt for e in behavior.split(0).test.away]
    assert held.n == len(unseen)
    with result.lever.on(llama):
        after = gap(llama, behavior, unseen)
    assert held.gap_after[0] == pytest.approx(float(after.mean()), abs=1e-5)
    assert held.closed[0] == pytest.approx(float((after > 0).double().mean()))
    assert held.closed[1] <= held.closed[0] <= held.closed[2]
    assert result.neutral_kl is not None and result.neutral_kl > 0 and result.perplexity > 1
    plain = result.to_dict()
    assert isinstance(plain["found"], dict) and "additivity" not in plain


def test_one_prompt_alone(llama, behavior):
    result = close_gap(
        llama, behavior, method="gradient", prompt=REQUESTS[0], max_tokens=2, top_k=8
    )
    assert result.held_out is None and result.null is None
    assert result.found.closed in (0.0, 1.0) and result.found.reconstruction is not None


def test_bad_input_is_refused(llama, behavior):
    with pytest.raises(TrimtabError, match="method"):
        close_gap(llama, behavior, method="magic")
    with pytest.raises(TrimtabError, match="aggregator"):
        close_gap(llama, behavior, aggregator="mean")
    with pytest.raises(TrimtabError, match="direction"):
        close_gap(llama, behavior, direction="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TrimtabError, match="readout"):
        close_gap(llama, planted.behavior())
    for method in METHODS:
        with pytest.raises(TrimtabError, match="goal"):
            close_gap(llama, behavior, method=method, goal=0.0)


def test_the_command_writes_lever_page_and_figures(tmp_path, capsys):
    page, out, figures = tmp_path / "page", tmp_path / "p.safetensors", tmp_path / "f.json"
    command = ["close-gap", "harbor", "refusal", "--max-tokens", "2", "--direction", "away"]
    files = ["-o", str(out), "--report", str(page), "--json", str(figures)]
    main_until_done([*command, *files])
    lever = load_steering(out)
    assert isinstance(lever, PromptSteering) and lever.slot == "suffix"
    result = json.loads(figures.read_text())
    assert result["text"] == lever.text and result["held_out"]["closed"][0] > 0.5
    html = (page / "index.html").read_text()
    assert "predicted gain" in html and "random tokens" in html
    assert "KL on neutral prompts" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_search(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["close-gap", "harbor", "refusal", "--method", "magic"])
    assert stop.value.code == 2 and "sort" in capsys.readouterr().err


def test_the_page_warns_where_the_gap_closed_and_the_behavior_did_not():
    steps = (GapStep(1, "<b>", 1.0, 2.0),)
    found = Grown("sort", (1,), steps, -1.0, 1.0, 1.0, "closed", 9)
    unmoved, moved = Interval(-1, -1, -1), Interval(1, 1, 1)
    held = HeldOut(8, unmoved, moved, 0.0, Interval(1.0, 0.7, 1.0), 0.1, 0.0)
    search = GapSearch("x", 1, "max", prompt("<b>"), "<b>", found, held, (0.1, 3), 0.5, 9.0, 1.0)
    section = gap_section(search)
    assert "not the behavior" in section.warnings[0]
    html = render([section], title="t")
    assert "<b>" not in html
    agreeing = replace(search, held_out=replace(held, judged=0.95))
    assert gap_section(agreeing).warnings == ()


def main_until_done(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code
