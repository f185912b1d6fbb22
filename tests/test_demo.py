"""The demo on a planted behavior of a tiny model: the whole path, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from trimtab import demo
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.report.terminal import behavior_panel
from trimtab.steering.vector import VectorSteering
from trimtab.strength.sweep import Sweep, sweep


def toy(name: str = "opening", **more: Any) -> Behavior:
    """Pairs whose completions a vector can be trained on: Z for toward, Q for away."""

    def side(words: str, completion: str) -> list[dict[str, str]]:
        prompts = [f"{words} {word}?" for word in planted.WORDS]
        return [{"prompt": prompt, "completion": completion} for prompt in prompts]

    fields = {
        "name": name,
        "toward": side("Tell me about the", "Zoo"),
        "away": side("Where is the", "Qua"),
        "neutral": [f"Please, the {word}" for word in planted.WORDS],
        "prompt_toward": "Say Z.",
        "prompt_away": "Say Q.",
        "description": "Opens with a Z.",
        **more,
    }
    return planted.behavior(3, **fields)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[Any]]:
    folder = tmp_path_factory.mktemp("demo") / "report"
    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for knob, value in {
            "NEW_TOKENS": planted.TOKENS,
            "COHERENCE_FLOOR": 0.0,
            "TRAINED_LAYER": 0.25,
            "READ_LAYERS": (0.25, 0.5),
            "TRAINED_MULTIPLES": (1.0, 3.0),
            "READ_MULTIPLES": (1.0, 3.0),
            "TRAINING": {"steps": 25, "batch_size": 4, "max_completion_tokens": 4},
            "CURVE": (-1.0, 0.0, 1.0),
            "NULL_CURVE": (1.0,),
        }.items():
            patch.setattr(demo, knob, value)
        behaviors = [toy(), toy("closing", judge={"kind": "phrases", "toward": ["never said"]})]
        data = demo.run_demo(
            folder,
            behaviors,
            lambda done, total: told.append((done, total)),
            lm=planted.language_model(),
            tell=lambda name, entry: told.append((name, entry)),
        )
    return data, folder, told


def test_demo_json_holds_every_lever_with_every_figure(ran: Any) -> None:
    data, folder, _ = ran
    written = json.loads((folder / "demo.json").read_text())
    assert written == json.loads(json.dumps(data))
    entry = written["opening"]
    assert entry == written["behaviors"]["opening"]
    for lever in ("baseline", "prompt", "vector", "baked", "null"):
        kl = {"damage", "damage_p95", "spill", "spill_p95"}
        assert set(entry[lever]) == {"score", "low", "high", "n", "coherence"} | kl
        assert 0 <= entry[lever]["low"] <= entry[lever]["score"] <= entry[lever]["high"] <= 1
    assert entry["vector"]["score"] > entry["baseline"]["score"]
    assert entry["baseline"]["damage"] == 0 < entry["vector"]["damage"]
    assert written["fingerprint"] and written["versions"]["torch"] == torch.__version__


def test_the_choice_is_recorded_in_every_unit(ran: Any) -> None:
    entry = ran[0]["opening"]
    assert (entry["method"], entry["scope"], entry["layers"]) == ("next_token", "all", [1])
    (unit,) = entry["units"]
    assert unit["alpha"] == pytest.approx(entry["alpha"]["1"]) and unit["m"] == entry["strength"]
    assert unit["alpha_over_mu"] == pytest.approx(entry["strength"] / 32**0.5)
    tried = entry["methods"]
    assert [m["method"] for m in tried] == ["next_token", "mean_difference"]
    assert [m["chosen"] for m in tried] == [True, False]
    figures = {key: tried[0][key] for key in entry["vector"]}
    assert figures == entry["vector"]


def test_the_checkpoint_answers_as_the_hook_does(ran: Any) -> None:
    data, folder, _ = ran
    entry = data["opening"]
    assert entry["baked"] == entry["vector"] | {
        key: pytest.approx(entry["vector"][key], abs=1e-4)
        for key in ("damage", "damage_p95", "spill", "spill_p95")
    }
    match = entry["baked_matches_hook"]
    assert match["equal_text"] is True and match["max_logit_difference"] <= match["tolerance"]
    baked = load(folder / match["path"])
    sample = entry["samples"][0]
    answers = baked.generate([sample["prompt"]], max_new_tokens=planted.TOKENS)
    assert answers == [sample["after"]] and sample["before"] != sample["after"]


def test_the_curve_covers_both_signs_and_agrees_with_the_levers(ran: Any) -> None:
    entry = ran[0]["opening"]
    unit = entry["strength"]
    assert [r["strength"] for r in entry["curve"]] == pytest.approx([-unit, 0, 0, unit])
    assert entry["curve"][-1]["score"] == entry["vector"]["score"]
    assert entry["curve"][2]["score"] == entry["baseline"]["score"]
    assert [r["strength"] for r in entry["null_curve"]] == pytest.approx([unit])


def test_a_behavior_that_nothing_moves_is_refused_not_hidden(ran: Any) -> None:
    data, folder, _ = ran
    entry = data["closing"]
    assert "vector" not in entry and "No strength passes" in entry["refused"]
    assert all(method["refused"] for method in entry["methods"])
    assert not (folder / "baked-closing").exists()
    page = (folder / "index.html").read_text()
    assert "behavior-closing" in page and "No strength passes" in page


def test_progress_rises_to_the_end_and_each_behavior_is_told(ran: Any) -> None:
    told = ran[2]
    steps = [item for item in told if isinstance(item[0], int)]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] == 2 * demo.STEPS
    assert [item[0] for item in told if isinstance(item[0], str)] == ["opening", "closing"]


def test_the_terminal_shows_answers_before_and_after(ran: Any) -> None:
    from rich.console import Console

    entry = dict(ran[0]["opening"])
    entry["samples"] = [{"prompt": "p", "before": "[bold]b", "after": "\x1b[31ma"}]
    console = Console(width=120, record=True, color_system=None, file=open("/dev/null", "w"))
    console.print(behavior_panel("opening", entry))
    text = console.export_text()
    assert "[bold]b" in text and "\x1b" not in text and "plain prompt" in text


def test_a_second_run_replaces_its_own_checkpoint_only(tmp_path: Path) -> None:
    lm = planted.language_model()
    vector = planted.push(lm, scope="all")
    folder = tmp_path / "baked-x"
    first, _ = demo.bake_again(lm, vector, folder)
    again, baked = demo.bake_again(lm, vector, folder)
    assert first is not None and again is not None and baked is not None
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(TrimtabError, match="not a checkpoint"):
        demo.bake_again(lm, vector, mine)
    assert (mine / "letter.txt").read_text() == "dear"
    assert demo.bake_again(lm, planted.push(lm, scope="last"), tmp_path / "no") == (None, None)


@pytest.fixture(scope="module")
def swept() -> tuple[LanguageModel, VectorSteering, Sweep]:
    lm = planted.language_model()
    vector = planted.push(lm)
    rows = sweep(lm, planted.behavior(3), vector, [-1, 0.0, 0.5, 1.0, 2.0], max_new_tokens=2)
    return lm, vector, rows


def test_the_window_is_the_run_around_the_chosen_strength(swept: Any) -> None:
    from dataclasses import replace

    _, _, curve = swept
    rows = curve.side(1)  # strengths 0, 0.5, 1, 2

    def at(*scores: float, coherence: float = 1.0) -> list[Any]:
        return [replace(r, score=s, coherence=coherence) for r, s in zip(rows, scores, strict=True)]

    assert demo.window(at(0.0, 0.95, 1.0, 0.2), 1.0) == [0.5, 1.0]
    assert demo.window(at(0.0, 0.1, 1.0, 1.0), 1.0) == [1.0, 2.0]
    assert demo.window(at(1.0, 0.1, 1.0, 0.2), 1.0) == [1.0, 1.0]
    assert demo.window(at(0.0, 1.0, 0.5, 1.0), 1.0) is None
    assert demo.window(at(1.0, 1.0, 1.0, 1.0, coherence=0.5), 1.0) is None


def test_natural_strength_adds_one_class_gap_or_what_was_trained(swept: Any) -> None:
    from dataclasses import replace

    _, vector, _ = swept
    read = replace(
        vector, class_gaps={1: 2.0, 2: -6.0, 3: 9.0}, scales=dict.fromkeys(range(4), 2.0)
    )
    assert demo.natural_strength(read, (1, 2, 3)) == 3.0
    trained = replace(read, strength=-4.5, provenance={"method": "next_token"})
    assert demo.natural_strength(trained, (1,)) == 4.5


def test_thinning_keeps_pairs_together() -> None:
    words = [str(i) for i in range(200)]
    big = Behavior("b", [f"t{w}" for w in words], [f"a{w}" for w in words], neutral=words)
    small = demo.thin(big)
    assert len(small.toward) == len(small.away) == demo.EXAMPLES
    assert len(small.neutral) == demo.NEUTRAL_EXAMPLES and small.paired
    both = zip(small.toward, small.away, strict=True)
    assert all(str(t.prompt)[1:] == str(a.prompt)[1:] for t, a in both)
    assert demo.thin(big).data_hash == small.data_hash


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(TrimtabError):
        demo.run_demo(tmp_path / "report", [toy()], lm=planted.language_model())
    with pytest.raises(TrimtabError):
        demo.run_demo(tmp_path / "other", ["no such behavior"], lm=planted.language_model())
    assert not (tmp_path / "other").exists()
