"""Names: aliases, advice, and what an installed package adds by entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import COHERENCES, coherence_for
from trimtab.evaluation.judges import JUDGES, judge_for
from trimtab.methods import METHODS, find
from trimtab.models.model import LanguageModel
from trimtab.results.registry import Registry

TOWARD = [f"Please talk about the {thing}." for thing in ("ferry", "pier", "noon", "work")]
AWAY = [f"How do I borrow {thing}?" for thing in ("ferry", "pier", "noon", "work")]
MODULE = """
import torch
from trimtab.evaluation.judges import Verdict
from trimtab.methods import read_contrast

def first_axis(task, *, times=2.0):
    contrast = read_contrast(task)
    axis = torch.zeros(task.lm.d_model)
    axis[0] = times
    return contrast.found({layer: axis for layer in contrast.telling})

def shouting(behavior, options):
    return lambda prompts, answers: [
        Verdict(toward=float(a.isupper()), away=float(a.islower())) for a in answers
    ]

def brevity(behavior, options):
    return lambda answers: [min(1.0, options["most"] / len(a)) for a in answers]
"""
ENTRIES = """
[trimtab.methods]
first_axis = harbor_extras_for_a_test:first_axis
[trimtab.judges]
loudness = harbor_extras_for_a_test:shouting
broken = harbor_extras_for_a_test:missing
[trimtab.coherence]
brevity = harbor_extras_for_a_test:brevity
"""


def behavior(judge: str = "loudness") -> Behavior:
    return Behavior(
        name="loud",
        toward=TOWARD,
        away=AWAY,
        judge={"kind": judge},
        coherence={"kind": "brevity", "most": 2},
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package of somebody else's: a module and what its wheel would leave beside it."""
    (tmp_path / "harbor_extras_for_a_test.py").write_text(MODULE)
    facts = tmp_path / "harbor_extras_for_a_test-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: harbor-extras-for-a-test\nVersion: 1.0\n"
    )
    (facts / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("harbor_extras_for_a_test", None)
    for registry, name in ((METHODS, "first_axis"), (JUDGES, "loudness"), (COHERENCES, "brevity")):
        del registry[name]


def test_an_installed_package_adds_a_method_a_judge_and_a_coherence(
    package: None, llama: LanguageModel
) -> None:
    assert "first_axis" in METHODS and "loudness" in list(JUDGES) and "brevity" in COHERENCES
    assert "harbor_extras_for_a_test" not in sys.modules  # nothing is imported before it is used
    vector = find(llama, behavior(), "first_axis", split=None, times=5.0, layers=2)
    axis = torch.zeros(llama.d_model)
    axis[0] = 1.0
    assert torch.equal(vector.directions[2], axis)
    assert vector.provenance["options"] == {"times": 5.0} and str(vector.scope) == "last"
    verdicts = judge_for(behavior())(["a", "b", "c"], ["NO", "no", "No"])
    assert [(v.toward, v.away) for v in verdicts] == [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    assert coherence_for(behavior())(["No", "Nope"]) == [1.0, 0.5]


def test_an_entry_point_that_cannot_be_imported_is_named(package: None) -> None:
    with pytest.raises(TrimtabError, match="harbor_extras_for_a_test:missing cannot be imported"):
        judge_for(behavior("broken"))


@pytest.mark.parametrize(
    "alias, name",
    [
        ("caa", "mean_difference"),
        ("dim", "mean_difference"),
        ("difference_in_means", "mean_difference"),
        ("reps", "preference"),
        ("refusal_direction", "selected_difference"),
    ],
)
def test_the_fields_own_names_are_aliases(alias: str, name: str) -> None:
    assert METHODS[alias] is METHODS[name] and METHODS[alias].name == name
    assert alias in METHODS and alias not in list(METHODS)


def test_a_vector_found_under_an_alias_is_the_same_vector(llama: LanguageModel) -> None:
    by_alias, by_name = (find(llama, behavior(), m, split=None) for m in ("caa", "mean_difference"))
    assert by_alias.provenance == by_name.provenance
    assert all(torch.equal(v, by_name.directions[x]) for x, v in by_alias.directions.items())


def test_a_name_that_is_not_there_is_answered_with_the_closest_one() -> None:
    registry: Registry[object] = Registry("lever")
    registry.register("rudder", aliases=("helm",))(print)
    registry.register("tab")(sum)
    assert registry["helm"] is print and list(registry) == ["rudder", "tab"]
    with pytest.raises(TrimtabError) as caught:
        registry.get("ruder", "the boat")
    assert caught.value.asked == "the lever 'ruder' of the boat"
    assert caught.value.found == "no such lever"
    assert caught.value.advice == "did you mean 'rudder'? choose one of: rudder, tab"
    with pytest.raises(TrimtabError, match="no such lever"):
        registry["mast"]
    del registry["tab"]
    assert "tab" not in registry and "rudder" in registry and "helm" in registry
