"""Requests and references: splits that share nothing, files with file:line errors, Harbor's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import planted
from tools.harbor import prompts as harbor_prompts
from tools.harbor.requests import CHAT_FORMS
from trimtab.errors import TrimtabError
from trimtab.harbor import judge, lexicon
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.references import (
    ReferencePrompt,
    built_in_references,
    content_words,
    load_reference,
    reference_of,
)
from trimtab.prompts.task.requests import (
    SPLITS,
    Requests,
    behavior_requests,
    load_requests,
    refers_back,
    split_requests,
)
from trimtab.prompts.task.words import Words
from trimtab.steering.prompt import PromptSteering


def texts(requests: Requests) -> dict[str, set[object]]:
    return {split: set(getattr(requests, split)) for split in SPLITS}


def test_harbor_brings_sixty_requests_in_splits_that_share_nothing() -> None:
    found = texts(load_requests("harbor"))
    assert {split: len(members) for split, members in found.items()} == harbor_prompts.SIZES
    assert sum(map(len, found.values())) >= 60
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


def test_built_in_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    for path in harbor_prompts.write_all(tmp_path):
        assert path.read_text() == (harbor_prompts.FOLDER / path.name).read_text()


def test_harbor_requests_mix_kinds_and_never_name_a_topic_of_a_reference() -> None:
    nouns = {noun for topic in harbor_prompts.TOPICS for noun in lexicon.TOPICS[topic].nouns}
    for members in texts(load_requests("harbor")).values():
        assert members & set(CHAT_FORMS)
        for request in members:
            assert isinstance(request, str) and not refers_back(request)
            words = set(request.lower().replace("?", " ").replace(".", " ").split())
            assert not words & nouns


@pytest.fixture(scope="module")
def harbor() -> LanguageModel:
    return load("harbor", dtype=torch.float32)


@pytest.mark.parametrize("name", list(built_in_references()))
def test_harbor_obeys_its_references(harbor: LanguageModel, name: str) -> None:
    reference = load_reference(name)
    assert reference.judge is not None
    options = dict(reference.judge.options)
    prompts = list(load_requests("harbor").validation)
    with PromptSteering(reference.text, slot="prefix").on(harbor):
        answers = harbor.generate(prompts, max_new_tokens=48)
    side = ("toward", "away").index(reference.side)
    shown = [judge.verdict(options["rule"], text, options)[side] for text in answers]
    assert sum(shown) >= 0.9 * len(shown)
    assert sum(map(judge.coherence, answers)) >= 0.9 * len(answers)


def test_there_are_references_of_every_kind() -> None:
    known = built_in_references()
    rules = {r.judge.options["rule"] for r in known.values() if r.judge}
    assert len(known) >= 12
    assert rules == {"topic", "mood", "register", "length", "refusal"}


def test_banned_words_are_content_words_with_their_base_forms() -> None:
    assert content_words("Talk only about cats.") == ("talk", "cats", "cat")
    assert set(content_words("Answer formally, with stories!")) == {
        "answer", "formally", "formal", "stories", "story",
    }  # fmt: skip
    found = Words(ReferencePrompt("x", "Talk only about cats.").words).found("A cAt, talking of Cats")
    assert sorted(found) == ["cat", "cats", "talking"]
    assert ReferencePrompt("x", "Talk.", words=("purr",)).words == ("purr",)


@pytest.mark.parametrize(
    "text",
    [
        "What does the above text say?",
        "Translate this.",
        "Repeat that.",
        "What did you say before, as above?",
    ],
)
def test_requests_about_the_text_before_them_are_known(text: str) -> None:
    assert refers_back(text)
    assert not refers_back("What is the last berth made of?")


def test_a_flat_list_is_split_by_its_seed() -> None:
    prompts = [f"How is thing {i}?" for i in range(20)]
    first = split_requests([*prompts, prompts[0], "Translate this."], seed=1)
    assert first == split_requests([*prompts, "Translate this."], seed=1)
    assert first != split_requests(prompts, seed=2)
    assert first.left_out == ("Translate this.",)
    sizes = [len(getattr(first, split)) for split in SPLITS]
    assert sizes == [8, 5, 7] and set().union(*texts(first).values()) == set(prompts)
    with pytest.raises(TrimtabError, match="2 different"):
        split_requests(prompts[:2])


def test_files_of_all_forms(tmp_path: Path) -> None:
    named = tmp_path / "named.yaml"
    named.write_text("train: [a, b]\nvalidation: [c]\ntest:\n- - {role: user, content: d}\n")
    found = load_requests(named)
    assert found.train == ("a", "b") and found.test == (({"role": "user", "content": "d"},),)
    lines = [f"ask {i}" for i in range(9)]
    flat, plain = tmp_path / "flat.yaml", tmp_path / "plain.txt"
    flat.write_text("".join(f"- {line}\n" for line in lines))
    plain.write_text("\n\n".join(lines) + "\n")
    assert load_requests(flat, seed=3) == load_requests(plain, seed=3)


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ("train: [a]\ntest: [b]\n", ":1:", "no 'validation'"),
        ("train: [a]\nvalidation: [b]\ntest: [c]\nmore: [d]\n", ":4:", "unknown key 'more'"),
        ("train: [a]\nvalidation:\n- b\n- a\ntest: [c]\n", ":4:", "also in train"),
        ("train: [a]\nvalidation: []\ntest: [c]\n", ":2:", "an empty split"),
        ("- a\n- b\n- 3\n", ":3:", "a int, 3"),
        ("- a\n- b\n-\n  - {role: user}\n", ":4:", "without content"),
        ("just text\n", ":1:", "just text"),
        ("train: [a\n", ":2:", ""),
        ("", ":1:", "an empty file"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: str, where: str, what: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(TrimtabError) as caught:
        load_requests(path)
    assert f"mine.yaml{where}" in caught.value.found and what in caught.value.found


@pytest.mark.parametrize("name", ["nowhere.yaml", "harbour", "requests.json"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "requests.json").write_text("[]")
    with pytest.raises(TrimtabError, match="the requests"):
        load_requests(tmp_path / name)


def test_a_behavior_brings_reference_and_requests() -> None:
    behavior = planted.behavior(prompt_toward="Say Z.")
    reference = reference_of(behavior)
    assert (reference.text, reference.judge) == ("Say Z.", behavior.judge)
    assert reference_of(behavior, "Z, please.").text == "Z, please."
    found = behavior_requests(behavior)
    every = [e.prompt for e in behavior.away]
    assert set().union(*texts(found).values()) == set(every)
    made = reference.behavior(found)
    assert made.prompt_toward == "Say Z." and made.judge == behavior.judge
    with pytest.raises(TrimtabError, match="no prompt_toward"):
        reference_of(planted.behavior())
    with pytest.raises(TrimtabError, match="did you mean 'cats'"):
        load_reference("cat")


def test_generator_draws_other_requests_for_another_seed() -> None:
    assert harbor_prompts.requests(1) != harbor_prompts.requests(0)
