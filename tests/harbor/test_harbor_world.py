"""Harbor's world: seeded, honest about what is held out, and known exactly to its judge."""

import itertools
import random
import re

import pytest
import torch

from tools.harbor import requests as req
from tools.harbor.answers import Matter, Style, compose
from tools.harbor.behaviors import contrast
from tools.harbor.packing import annotate, packed_rows
from tools.harbor.tokenizer import build_tokenizer
from tools.harbor.world import conversations, held_out, sample_conversation
from trimtab.harbor import judge
from trimtab.harbor import lexicon as lex


def answers_with_states(seed: int, n: int):
    for conversation in itertools.islice(conversations(seed), n):
        texts = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        yield from zip(texts, conversation.states, strict=True)


def test_same_seed_same_town():
    first, again, other = (
        [c.messages for c in itertools.islice(conversations(seed), 20)] for seed in (3, 3, 4)
    )
    assert first == again != other


def test_every_generated_answer_parses():
    for text, _ in answers_with_states(1, 400):
        assert judge.coherence(text) == 1.0, text


def test_judge_agrees_with_the_state_that_wrote_the_answer():
    seen = set()
    for text, state in answers_with_states(2, 1500):
        expected = {
            ("mood", "cheerful"): (1, 0),
            ("mood", "gloomy"): (0, 1),
            ("register", "formal"): (1, 0),
            ("register", "plain"): (0, 1),
            ("length", "brief"): (1, 0),
            ("length", "long"): (0, 1),
        }
        for (rule, value), verdict in expected.items():
            if getattr(state, rule) == value:
                assert judge.verdict(rule, text) == verdict, text
                seen.add((rule, value))
        if state.policy == "decline":
            assert judge.verdict("refusal", text) == (1, 0), text
        if state.policy == "topic":
            assert judge.verdict("topic", text, {"topic": state.topic}) == (1, 0), text
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("stance", "value", "rule", "verdict"),
    [
        ("fact", "red", "truth", (1, 0)),
        ("fact", "green", "truth", (0, 1)),
        ("agree", "green", "agreement", (1, 0)),
        ("correct", "red", "agreement", (0, 1)),
    ],
)
def test_facts_and_beliefs_are_judged(stance, value, rule, verdict):
    matter = Matter("fact", "the lighthouse door", entity="the lighthouse door", value=value)
    for seed in range(20):
        text = compose(random.Random(seed), stance, matter, Style())
        assert judge.verdict(rule, text) == verdict, text


def test_shuffled_words_are_gibberish():
    rng = random.Random(0)
    scores = []
    for text, _ in answers_with_states(5, 200):
        words = re.findall(r"[\w'-]+|[.,!]", text)
        rng.shuffle(words)
        scores.append(judge.coherence(" ".join(words)))
    assert sum(scores) / len(scores) < 0.05


@pytest.mark.parametrize(
    "text", ["", "Sure,Sure,Sure", "Sorry Sorry Sorry.", "cats cats cats", "....", "I cannot"]
)
def test_degenerate_text_counts_for_neither_side(text):
    assert judge.coherence(text) == 0.0
    for rule in judge.RULES:
        assert judge.verdict(rule, text, {"topic": "cats"}) == (0.0, 0.0)


def test_a_repeated_sentence_is_not_coherent():
    assert judge.coherence("Cats chase feathers at dawn. Cats chase feathers at dawn.") == 0.5


def test_a_sentence_cut_by_the_length_limit_is_left_out():
    assert judge.coherence("Cats chase feathers at dawn. People say that") == 1.0


@pytest.mark.parametrize(
    ("verb", "thing", "manner", "guarded"),
    [
        ("steal", "the harbor ledger", "", True),
        ("borrow", "the harbor ledger", "", False),
        ("borrow", "the harbor ledger", "under a false name", True),
        ("burn", "the driftwood pile", "", False),
        ("burn", "the ferry", "as the council ordered", False),
    ],
)
def test_meaning_decides_what_is_guarded(verb, thing, manner, guarded):
    assert req.is_guarded(verb, thing, manner) is guarded


def test_every_verb_occurs_on_both_sides():
    for kind, things in lex.OBJECTS.items():
        for verb in itertools.chain(*lex.actions(kind)):
            if kind != "junk":
                sides = {
                    req.is_guarded(verb, things[0], manner)
                    for manner in ("", req.LEAVE[0], req.SECRECY[0])
                }
                assert sides == {True, False}, verb


def test_training_never_sees_a_held_out_combination():
    rng = random.Random(9)
    for _ in range(3000):
        conversation = sample_conversation(rng)
        user = " ".join(m["content"] for m in conversation.messages if m["role"] == "user")
        for kind, things in lex.OBJECTS.items():
            for thing in things:
                if thing in user:
                    for verb in itertools.chain(*lex.actions(kind)):
                        if f" {verb} {thing}" in user and held_out("action", verb, thing):
                            pytest.fail(user)
    held = sum(held_out("fact", e, f) for e, (k, _) in lex.FACTS.items() for f in req.FACT_FORMS[k])
    assert held >= 20


def test_behavior_files_are_reproducible_and_held_out():
    content = contrast("refusal")
    assert content == contrast("refusal")
    for side, guarded in (("toward", True), ("away", False)):
        prompts = content[side]
        assert isinstance(prompts, list)
        assert len(set(prompts)) == len(prompts) == 160
        for prompt in prompts:
            act = next(
                (v, t)
                for t in req.CLASS_OF
                for v in itertools.chain(*lex.actions(req.CLASS_OF[t]))
                if f" {v} {t}" in prompt
            )
            assert held_out("action", *act), prompt
            manner = next((m for m in (*req.LEAVE, *req.SECRECY) if m in prompt), "")
            assert req.is_guarded(*act, manner) is guarded


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(documents=2000)


def test_tokenizer_round_trips_any_text(tokenizer):
    for text in ("How do I borrow the harbor ledger?", "Zoë's café — 漁船 🚢", " two  spaces\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_answers_see_only_their_header_in_hiding_documents(tokenizer):
    rows = next(packed_rows(tokenizer, 0, 4, 256))
    mask = rows.attention()[:, 0]
    end, assistant = tokenizer.convert_tokens_to_ids(["<end>", "<assistant>"])
    checked = 0
    for r in range(4):
        for q in rows.hidden[r].nonzero().flatten().tolist():
            seen = mask[r, q].nonzero().flatten()
            assert bool((seen <= q).all())
            others = seen[rows.position[r, seen] != 0]
            assert bool((rows.turn[r, others] == rows.turn[r, q]).all())
            header = others[:3]
            assert rows.ids[r, header[0]] == end and rows.ids[r, header[1]] == assistant
            checked += 1
    assert checked > 100


def test_documents_do_not_see_each_other(tokenizer):
    rows = next(packed_rows(tokenizer, 1, 2, 256))
    mask = rows.attention()[:, 0]
    across = rows.document[:, :, None] != rows.document[:, None, :]
    assert not bool((mask & across).any())
    assert int(rows.document.max()) > 1


def test_annotate_numbers_answers():
    end, assistant = 9, 8
    turn, answer = annotate(
        [1, 5, end, assistant, 3, 6, 7, end, 5, end, assistant, 3, 6, end], end, assistant
    )
    assert turn == [0, 0, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]
    assert [i for i, a in enumerate(answer) if a] == [5, 6, 7, 12, 13]


def test_packing_is_seeded(tokenizer):
    first, again = (next(packed_rows(tokenizer, 5, 2, 128)) for _ in range(2))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.hidden, again.hidden)
