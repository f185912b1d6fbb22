"""Behaviors: coercion, files with file:line errors, splits."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab.behaviors import built_in_names
from trimtab.behaviors.behavior import Behavior, Example, JudgeSpec, Readout
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "polite.yaml"
SIDES = ("toward", "away", "neutral", "requests")


def make(n: int = 8, **more: object) -> Behavior:
    fields: dict[str, Any] = {
        "toward": [f"kind {i}" for i in range(n)],
        "away": [f"curt {i}" for i in range(n)],
        "neutral": [f"plain {i}" for i in range(n)],
        **more,
    }
    return Behavior(**{"name": "polite", **fields})


def test_every_form_of_example_is_the_same_value() -> None:
    messages = [{"role": "user", "content": "hello"}]
    made = Behavior(
        "x", toward=["hello", messages], away=[{"prompt": "b", "completion": "c"}, Example("d")]
    )
    assert made.toward == (Example("hello"), Example(tuple(messages)))
    assert made.away == (Example("b", "c"), Example("d"))
    assert made.toward[0].key == made.toward[1].key
    messages[0]["content"] = "changed"
    assert made.toward[1].key == Example("hello").key


def test_plain_values_round_trip() -> None:
    made = make(
        readout={"toward": ["Yes"], "away": ["No"]},
        judge={"kind": "phrases", "toward": ["please"]},
        coherence="text",
        prompt_toward="Be kind.",
        requests=[[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]],
    )
    assert made.readout == Readout(("Yes",), ("No",))
    assert made.judge == JudgeSpec("phrases", {"toward": ["please"]})
    assert made.coherence == JudgeSpec("text", {})
    again = Behavior(**json.loads(json.dumps(made.to_dict())))
    assert again == made and hash(again) == hash(made) and again.data_hash == made.data_hash
    assert make(prompt_toward="Be kinder.").data_hash != made.data_hash


def test_paired_by_default_when_equally_long() -> None:
    assert make().paired
    assert not make(away=["one"]).paired
    assert not make(paired=False).paired
    with pytest.raises(TrimtabError, match="8 toward and 1 away"):
        make(away=["one"], paired=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"toward": []}, "empty list"),
        ({"away": []}, "empty list"),
        ({"away": ["kind 1"]}, "also toward"),
        ({"toward": ["a", "b"], "away": ["b", "a "]}, "same examples on both sides"),
        ({"toward": ["a", 3]}, "3"),
        ({"toward": ["a", "  "]}, "empty text"),
        ({"toward": "abc"}, "abc"),
        ({"toward": [b"abc"]}, "bytes"),
        ({"toward": [[]]}, "list"),
        ({"toward": [[{"role": "user", "text": "x"}]]}, "'text'"),
        ({"toward": [[{"role": "user"}]]}, "without content"),
        ({"toward": [[{"role": "assistant", "content": "x"}]]}, "assistant's words"),
        ({"toward": [{"role": "user", "content": "x"}]}, "unknown key 'role'"),
        ({"toward": [{"prompt": "x", "completion": 3}]}, "3"),
        ({"toward": [{"completion": "x"}]}, "without a prompt"),
        ({"readout": {"toward": ["Yes"]}}, "Yes"),
        ({"readout": {"toward": ["Yes"], "away": ["Yes"]}}, "both sides"),
        ({"readout": {"toward": [], "away": ["No"]}}, "toward"),
        ({"judge": {"options": {}}}, "options"),
        ({"judge": {"kind": "x", "value": {1, 2}}}, "JSON"),
        ({"name": " "}, "empty text"),
        ({"prompt_toward": 3}, "3"),
        ({"paired": "yes"}, "yes"),
    ],
)
def test_bad_content_is_one_error(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        make(**fields)
    assert said in str(caught.value)
    assert str(copy.copy(caught.value)) == str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize("n", [3, 4, 5, 7, 10, 41, 160])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("fractions", [(0.5, 0.25, 0.25), (0.9, 0.05, 0.05)])
def test_split_is_disjoint_complete_and_never_empty(
    n: int, paired: bool, fractions: tuple[float, float, float]
) -> None:
    made = make(n, paired=paired)
    splits = made.split(seed=3, fractions=fractions)
    parts = (splits.train, splits.validation, splits.test)
    for side in ("toward", "away", "neutral"):
        listed = [e for part in parts for e in getattr(part, side)]
        assert sorted(e.key for e in listed) == sorted(e.key for e in getattr(made, side))
        assert all(getattr(part, side) for part in parts)
    assert all(part.judge == made.judge and part.paired == paired for part in parts)
    if n >= 41 and fractions[0] == 0.5:
        assert abs(len(splits.train.toward) - n / 2) <= 1
        assert abs(len(splits.test.away) - n / 4) <= 1
    if paired:
        for part in parts:
            for toward, away in zip(part.toward, part.away, strict=True):
                assert str(toward.prompt).split()[1] == str(away.prompt).split()[1]


def test_split_is_repeatable_and_depends_on_the_seed() -> None:
    assert make(20).split(1) == make(20).split(1)
    assert make(20).split(1) != make(20).split(2)


@pytest.mark.parametrize("paired", [True, False])
def test_duplicates_stay_in_one_split(paired: bool) -> None:
    toward = [f"kind {i % 6}" + " " * (i % 2) for i in range(18)]
    away: list[object] = [[{"role": "user", "content": f"curt {i % 5}"}] for i in range(18)]
    neutral = ["kind 0", "curt 1", "other"]
    splits = make(toward=toward, away=away, neutral=neutral, paired=paired, requests=["curt 2"])
    homes: dict[str, set[str]] = {}
    if paired:  # 6 and 5 repeat against each other, so everything hangs together
        with pytest.raises(TrimtabError, match="at least 3 on each side"):
            splits.split(0)
        return
    for seed in range(20):
        homes.clear()
        parts = splits.split(seed)
        for name in ("train", "validation", "test"):
            for side in SIDES:
                for example in getattr(parts.named(name), side):
                    homes.setdefault(example.key, set()).add(name)
        assert all(len(names) == 1 for names in homes.values())


def test_too_few_examples_say_how_many_are_needed() -> None:
    for n in (1, 2):
        with pytest.raises(TrimtabError, match="at least 3 on each side"):
            make(n).split()
    with pytest.raises(TrimtabError, match="3 on each side"):
        make(toward=["a", "a ", "a  ", "b"], away=["c", "d", "e"]).split()
    with pytest.raises(TrimtabError, match="summing to 1"):
        make().split(fractions=(0.5, 0.5, 0.5))
    with pytest.raises(TrimtabError, match="train, validation, test"):
        make().split().named("tset")


# Files


def test_the_example_in_the_docs_loads() -> None:
    made = load_behavior(EXAMPLE)
    assert made.name == "polite" and made.paired
    assert len(made.toward) == len(made.away) == 6
    assert made.readout == Readout(("Certainly", "Of course", "Thank"), ("No", "Yes", "Just"))
    assert made.judge is not None and made.judge.kind == "phrases"
    assert made.toward[3].completion == "Thank you for asking! It is usually mild, with some rain."
    assert isinstance(made.toward[4].prompt, tuple) and made.toward[4].prompt[0]["role"] == "system"
    assert all((made.split().train.toward, made.split().validation.toward, made.split().test.away))


def test_the_yaml_in_the_page_loads(tmp_path: Path) -> None:
    page = (EXAMPLE.parent.parent / "behaviors.md").read_text(encoding="utf-8")
    for language, name in (("yaml", "polite.yaml"), ("json", "polite.jsonl")):
        path = tmp_path / name
        path.write_text(
            page.split(f'```{language} title="{name}"\n')[1].split("```")[0], encoding="utf-8"
        )
        assert load_behavior(path).name == "polite"


def test_every_built_in_behavior_loads_and_splits() -> None:
    assert "refusal" in built_in_names()
    for name in built_in_names():
        made = load_behavior(name)
        assert made.name == name and made.judge is not None
        assert min(len(made.toward), len(made.away)) >= 30
        train = {e.key for e in made.split().train.toward}
        assert not train & {e.key for e in made.split().test.toward}


def test_a_file_takes_what_the_constructor_takes(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("toward: [a]\naway: [b]\njudge: readout\nname: null\n")
    made = load_behavior(path)
    assert made == Behavior("short", ["a"], ["b"], judge="readout")
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "long"


def test_bare_words_are_text(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(
        "toward: [yes, 2024-01-02]\naway: [no, off]\npaired: true\n"
        "judge: {kind: k, number: 3, share: .5, on: true, none: null, text: '3'}\n"
    )
    made = load_behavior(path)
    assert made.name == "words"
    assert made.toward == (Example("yes"), Example("2024-01-02"))
    assert made.judge is not None
    assert made.judge.options == {"number": 3, "share": 0.5, "on": True, "none": None, "text": "3"}


BAD_YAML = [
    ("toward: [a]\naway: [b]\ntowards: [c]\n", 3, "did you mean 'toward'"),
    ("toward: [a]\ntoward: [b]\naway: [c]\n", 2, "second time"),
    ("toward: [a]\n", 1, "no 'away'"),
    ("toward:\n  - a\n  - 3\naway: [b]\n", 3, "toward[1]"),
    ("toward:\n  - a\n  - true\naway: [b]\n", 3, "boolean"),
    ("toward: [a]\naway:\n  - [{role: user, contents: x}]\n", 3, "unknown key 'contents'"),
    ("toward: [a]\naway:\n  - {prompt: x, completion: 3}\n", 3, "away[0].completion"),
    ("toward: [a]\naway:\n  - {prompt: x, answer: y}\n", 3, "unknown key 'answer'"),
    ("toward: a\naway: [b]\n", 1, "give a list"),
    ("toward: []\naway: [b]\n", 1, "empty list"),
    ("toward: [a]\naway: [c, a]\n", 2, "also toward"),
    ("toward: [a, b]\naway: [b, a]\n", 2, "same examples"),
    ("toward: [a]\naway: [b]\nreadout: {toward: [x], from: [y]}\n", 3, "toward, away"),
    ("toward: [a]\naway: [b]\njudge: {rule: x}\n", 3, "kind"),
    ("toward: [a]\naway: [b]\npaired: maybe\n", 3, "true or false"),
    ("toward: [a]\naway: [b]\nname: 3\n", 3, "quotes"),
    ("toward: &x [a]\naway: *x\n", 2, "alias"),
    ("toward: [!!python/object:os.system a]\naway: [b]\n", 1, "tag"),
    ("toward: [a\naway: [b]\n", 2, "found: bad.yaml"),
    ("toward: [a]\n\taway: [b]\n", 2, "found: bad.yaml"),
    ("toward: [a]\naway: [b]\n---\ntoward: [c]\n", 3, "one behavior per file"),
    ("- a\n- b\n", 1, "keys and values"),
    ("just text\n", 1, "keys and values"),
    ("", 1, "empty file"),
    ("# nothing\n", 1, "no content"),
    ("toward: [a]\naway: [b\x07]\n", 2, "does not allow"),
    ("[" * 5000, 1, "nested too deeply"),
    ("toward: [a]\naway: [b]\n3: x\n", 3, "unknown key '3'"),
    ("toward: [a]\naway: [b]\n? [x]\n: y\n", 3, "not a word"),
]


@pytest.mark.parametrize(("text", "line", "said"), BAD_YAML)
def test_bad_yaml_names_file_and_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrimtabError) as caught:
        load_behavior(path)
    assert f"bad.yaml:{line}: " in caught.value.found, str(caught.value)
    assert said in str(caught.value)


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"toward: [a]\naway: [caf\xe9]\n")
    with pytest.raises(TrimtabError, match="bad.yaml:2: the byte 0xe9"):
        load_behavior(path)
    path.write_bytes("\ufefftoward: [café]\naway: [b]\n".encode())
    assert load_behavior(path).toward[0].prompt == "café"


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "polite.jsonl"
    lines = [
        {"behavior": {"name": "kind", "readout": {"toward": ["Yes"], "away": ["No"]}}},
        {"side": "toward", "prompt": "a"},
        {"side": "away", "prompt": [{"role": "user", "content": "b"}], "completion": "c"},
        {"side": "neutral", "prompt": "d"},
        {"side": "requests", "prompt": "e"},
    ]
    path.write_text("\n\n".join(json.dumps(item) for item in lines), encoding="utf-8")
    made = load_behavior(str(path))
    assert made.name == "kind" and made.readout is not None
    assert made.away == (Example(({"role": "user", "content": "b"},), "c"),)
    assert made.neutral == (Example("d"),) and made.requests == (Example("e"),)
    path.write_text('{"side": "toward", "prompt": "a"}\n{"side": "away", "prompt": "b"}\n')
    assert load_behavior(path).name == "polite"


GOOD = '{"side": "toward", "prompt": "a"}\n{"side": "away", "prompt": "b"}\n'
BAD_JSONL = [
    (GOOD + '{"side": "towards", "prompt": "c"}', 3, "did you mean 'toward'"),
    (GOOD + '{"prompt": "c"}', 3, "without a side"),
    (GOOD + '{"side": "away", "promt": "c"}', 3, "did you mean 'prompt'"),
    (GOOD + '{"side": "away"}', 3, "without a prompt"),
    (GOOD + '{"side": "away", "prompt": 3}', 3, "3"),
    (GOOD + '{"side": "away", "side": "toward", "prompt": "c"}', 3, "second time"),
    (GOOD + '{"side": "away", "prompt": "c"', 3, "no JSON"),
    (GOOD + '{"side": "away", "prompt": NaN}', 3, "NaN"),
    (GOOD + "[1]", 3, "a list"),
    (GOOD + '{"behavior": {}}', 3, "first line"),
    (GOOD + '{"side": "away", "prompt": "a"}', 3, "also toward"),
    ('{"side": "toward", "prompt": "a"}\n', 1, "no 'away'"),
    ('{"behavior": {"naem": "x"}}\n' + GOOD, 1, "did you mean 'name'"),
    ('\n{"behavior": {"toward": ["x"]}}\n' + GOOD, 2, "a line of its own"),
    ("\n \n", 1, "empty file"),
]


@pytest.mark.parametrize(("text", "line", "said"), BAD_JSONL)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrimtabError) as caught:
        load_behavior(path)
    assert f"bad.jsonl:{line}: " in caught.value.found, str(caught.value)
    assert said in str(caught.value)


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="did you mean 'refusal'"):
        load_behavior("refusl")
    with pytest.raises(TrimtabError, match="no such file"):
        load_behavior("nowhere/polite.yaml")
    with pytest.raises(TrimtabError, match="a folder"):
        load_behavior(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TrimtabError, match="ends in .yaml"):
        load_behavior(tmp_path / "x.json")
    for nothing in ("", None, 3):
        with pytest.raises(TrimtabError):
            load_behavior(nothing)  # pyright: ignore[reportArgumentType]
