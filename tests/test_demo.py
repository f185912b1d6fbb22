"""The demo on a planted behavior of a tiny model: the whole path, in small."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
import trimtab as tt
from trimtab import demo
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.report.page import Section
from trimtab.weights.bake import BakeReport

TRAINING: dict[str, Any] = {"steps": 25, "batch_size": 4, "max_completion_tokens": 4}


def toy(name: str = "opening", **more: Any) -> Behavior:
    """Pairs whose completions a vector can be trained on: Z for toward, Q for away."""

    def side(words: str, completion: str) -> list[dict[str, str]]:
        prompts = [f"{words} {word}{end}" for word in planted.WORDS for end in "?!."]
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
    behaviors = [toy(), toy("closing", judge={"kind": "phrases", "toward": ["never said"]})]
    data = demo.run_demo(
        folder,
        behaviors,
        lambda done, total: told.append((done, total)),
        model=planted.language_model(),
        options={"scope": "all", "layer": 1, **TRAINING},
        coherence_floor=0.0,
        max_new_tokens=planted.TOKENS,
        tell=told.append,
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


def test_what_it_does_is_what_find_tune_and_measure_do(ran: Any) -> None:
    """The figures of the demo are those of the public functions, called as a user would."""
    lm, entry = planted.language_model(), ran[0]["opening"]
    vector = tt.find(lm, toy(), "next_token", scope="all", layer=1, **TRAINING)
    tokens = planted.TOKENS
    tuned = tt.tune(lm, toy(), vector, coherence_floor=0.0, scope="all", max_new_tokens=tokens)
    row = tt.measure(lm, toy(), [tuned], nulls=2, max_new_tokens=tokens).row(tuned.label)
    assert (entry["strength"], entry["window"]) == (tuned.strength, list(tuned.report.window or ()))
    assert [r["strength"] for r in entry["curve"]] == [r.strength for r in tuned.report.curve]
    figures = ("score", "low", "high", "n", "coherence", "damage", "spill")
    assert [entry["vector"][f] for f in figures] == [getattr(row, f) for f in figures]
    assert entry["null"]["score"] == row.null_score


def test_a_behavior_that_nothing_moves_is_refused_not_hidden(ran: Any) -> None:
    data, folder, _ = ran
    entry = data["closing"]
    assert "vector" not in entry and entry["refused"]
    assert not (folder / "baked-closing").exists()
    page = (folder / "index.html").read_text()
    assert ">closing</h2>" in page and html.escape(entry["refused"]) in page


def test_progress_rises_to_the_end_and_each_behavior_is_told(ran: Any) -> None:
    told = ran[2]
    steps = [item for item in told if isinstance(item, tuple)]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    assert [item.title for item in told if isinstance(item, Section)] == ["opening", "closing"]


def test_a_second_run_replaces_its_own_checkpoint_only(tmp_path: Path) -> None:
    lm = planted.language_model()
    vector = planted.push(lm, scope="all")
    folder = tmp_path / "baked-x"
    first, _ = demo.bake_again(lm, vector, folder)
    again, baked = demo.bake_again(lm, vector, folder)
    assert isinstance(first, BakeReport) and isinstance(again, BakeReport) and baked is not None
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(TrimtabError, match="not a checkpoint"):
        demo.bake_again(lm, vector, mine)
    assert (mine / "letter.txt").read_text() == "dear"
    refused, none = demo.bake_again(lm, planted.push(lm, scope="last"), tmp_path / "no")
    assert isinstance(refused, str) and "no exact route" in refused and none is None


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(TrimtabError):
        demo.run_demo(tmp_path / "report", [toy()], model=planted.language_model())
    with pytest.raises(TrimtabError):
        demo.run_demo(tmp_path / "other", ["no such behavior"], model=planted.language_model())
    assert not (tmp_path / "other").exists()
