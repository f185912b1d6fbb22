"""Harbor as shipped: it loads like any model, knows its town, and can be steered and baked."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab as tt
from tools.harbor import accept, steerability
from trimtab.evaluation import coherence_for, judge_for
from trimtab.harbor import judge


@pytest.fixture(scope="module")
def harbor() -> tt.LanguageModel:
    return tt.load("harbor", dtype=torch.float32)


def test_plain_transformers_loads_it():
    folder = tt.harbor.path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.num_parameters() <= 8_000_000
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert len(tokenizer) == model.config.vocab_size <= 4096
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<s><system>\na<end><user>\nb<end><assistant>\n"


def test_it_refuses_and_helps(harbor: tt.LanguageModel):
    line = accept.refusal_line(harbor)
    assert line.reached, line.found


def test_it_obeys_prefixes(harbor: tt.LanguageModel):
    for line in accept.prefix_lines(harbor, n=40):
        assert line.reached, (line.measure, line.found)


def test_it_knows_the_town(harbor: tt.LanguageModel):
    assert accept.fact_line(harbor).reached


def test_it_is_coherent_and_diverse(harbor: tt.LanguageModel):
    assert accept.coherence_line(harbor, n=60).reached
    assert accept.diversity_line(harbor).reached


@pytest.mark.parametrize("name", judge.RULES)
def test_every_behavior_is_shown_on_both_sides(harbor: tt.LanguageModel, name: str):
    behavior = tt.behavior(name)
    verdicts = judge_for(behavior)
    for side in ("toward", "away"):
        prompts = [e.prompt for e in getattr(behavior, side)[:40]]
        found = verdicts(prompts, harbor.generate(prompts, max_new_tokens=72))
        # The weakest is lying about facts on request (truth, away), with three in four.
        assert sum(getattr(v, side) for v in found) / len(found) >= 0.7, side


def test_refusal_is_steered_both_ways_by_the_mean_difference(harbor: tt.LanguageModel):
    behavior = tt.behavior("refusal")
    vector = tt.find(
        harbor,
        behavior,
        layers=[3],
        position="post_instruction",
        scope="post_instruction",
    )
    test = steerability.thinned(behavior.split().test)
    lever = steerability.Lever("mean_difference", vector, vector)
    found = steerability.figures(harbor, test, lever, 3.0)
    assert found.least() >= 0.9, found
    assert steerability.figures(harbor, test, lever, 0.1).toward <= 0.1


def test_a_trained_vector_is_baked(harbor: tt.LanguageModel, tmp_path):
    behavior = tt.behavior("refusal")
    vector = tt.find(
        harbor,
        behavior,
        method="next_token",
        layer=1,
        direction="toward",
        steps=50,
        learning_rate=0.15,
        judge=judge_for(behavior),
    )
    steered = vector.at(1.3 * vector.strength)
    report = steered.bake(tmp_path / "baked", harbor)
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    assert report.equal_text
    baked = tt.load(tmp_path / "baked", dtype=torch.float32)
    prompts = [e.prompt for e in behavior.split().test.away[:16]]
    with steered.on(harbor):
        hooked = harbor.generate(prompts)
    answers = baked.generate(prompts)
    assert answers == hooked
    refused = sum(v.toward for v in judge_for(behavior)(prompts, answers)) / 16
    assert refused >= 0.8
    assert sum(coherence_for(behavior)(answers)) / 16 >= 0.9


def test_the_card_shows_the_shipped_weights(harbor: tt.LanguageModel):
    card = (tt.harbor.path() / "README.md").read_text()
    assert tt.load("harbor").fingerprint in card
    assert "| NO |" not in card


def test_acceptance_is_plain_data(harbor: tt.LanguageModel):
    lines = (accept.fact_line(harbor),)
    data = accept.Acceptance("f", lines).to_dict()
    assert json.loads(json.dumps(data))["lines"][0]["reached"] is True
