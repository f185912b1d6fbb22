"""The command line: thin, one message for one mistake, nothing written on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import planted
import tiny
from trimtab import cli
from trimtab.cli.support import parse_layers
from trimtab.errors import TrimtabError
from trimtab.models.load import load
from trimtab.results.tables import clean
from trimtab.steering.load import load_steering
from trimtab.steering.prompt import PromptSteering
from trimtab.steering.vector import VectorSteering

COMMANDS = (
    "find",
    "tune",
    "laws",
    "generate",
    "search",
    "close-gap",
    "audit",
    "measure",
    "bake",
    "export",
    "inspect",
    "levers",
    "explain",
    "serve",
    "studio",
    "doctor",
    "demo",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = planted.language_model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def behavior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("behaviors") / "opening.yaml"
    content = planted.behavior(prompt_toward="Say Z.").to_dict()
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    return path


@pytest.fixture(scope="module")
def vector(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "push.safetensors"
    return planted.push(load(model), scope="all").save(path)


class Ran:
    """Exit code, stdout and stderr of one command run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        hook = sys.excepthook
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        sys.excepthook = hook
        self.code = left.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: Ran(capsys, *arguments)


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_has_an_example(run: Any, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0 and f"Example: trimtab {command}" in done.out


def test_version_is_the_installed_one(run: Any) -> None:
    from importlib.metadata import version

    done = run("--version")
    assert (done.code, done.out) == (0, f"trimtab {version('trimtab')}\n")


def test_find_writes_a_file_that_steers(
    run: Any, model: Path, behavior: Path, tmp_path: Path
) -> None:
    out, facts = tmp_path / "v.safetensors", tmp_path / "v.json"
    options = ["--layers", "1-2", "--scope", "all", "--strength", "1.5", "--json", facts]
    done = run("find", model, behavior, "-o", out, *options)
    assert done.code == 0, done.err
    found = load_steering(out)
    assert isinstance(found, VectorSteering)
    assert (found.layers, str(found.scope), found.strength) == ((1, 2), "all", 1.5)
    written = json.loads(facts.read_text())
    assert written["layers"] == [1, 2] and written["method"] == "mean_difference"
    with found.on(load(model)):
        pass  # the fingerprint fits


def test_find_writes_a_folder_of_several(
    run: Any, model: Path, behavior: Path, tmp_path: Path
) -> None:
    out, facts = tmp_path / "vectors", tmp_path / "v.json"
    done = run(
        *("find", model, f"{behavior},mood", "-o", out, "--method", "pca"),
        *("--each-layer", "1-2", "--strength", "2", "--json", facts),
    )
    assert done.code == 0, done.err
    names = {f"{name}-{layer}.safetensors" for name in ("opening", "mood") for layer in (1, 2)}
    assert files_in(out) == names
    for name in names:
        found = load_steering(out / name)
        assert isinstance(found, VectorSteering) and found.strength == 2.0
        assert found.layers == (int(name[-len("1.safetensors")]),)
    assert {Path(f["file"]).name for f in json.loads(facts.read_text())["files"]} == names


def test_generate_prints_the_answer_alone(run: Any, model: Path, vector: Path) -> None:
    lm = load(model)
    asked = ("generate", model, "Where?", "--max-new-tokens", "4")
    assert run(*asked).out == clean(lm.generate("Where?", max_new_tokens=4)) + "\n"
    steering = load_steering(vector)
    with steering.at(2.0).on(lm):
        steered = lm.generate("Where?", max_new_tokens=4)
    done = run(*asked, "--with", vector, "--strength", "2")
    assert done.out == clean(steered) + "\n" != run(*asked).out
    with PromptSteering("Be brief.").on(lm):
        told = lm.generate("Where?", max_new_tokens=4)
    assert run(*asked, "--system", "Be brief.").out == clean(told) + "\n"


def test_generate_samples_by_seed_and_records_it(run: Any, model: Path, tmp_path: Path) -> None:
    lm, path = load(model), tmp_path / "a.json"
    options = ("--temperature", "1", "--seed", "7", "--max-new-tokens", "5", "--json", path)
    done = run("generate", model, "Where?", *options)
    assert done.code == 0
    written = json.loads(path.read_text())
    assert written["answer"] == lm.generate("Where?", max_new_tokens=5, temperature=1.0, seed=7)
    assert written["seed"] == 7 and written["fingerprint"] == lm.fingerprint


def test_measure_shows_levers_beside_baseline_prompt_and_null(
    run: Any, model: Path, behavior: Path, vector: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    levers = (vector, "prompt:Say Q.")
    options = ("--max-new-tokens", "2", "--nulls", "1", "--checkpoint", model, "--json", path)
    done = run("measure", model, behavior, *levers, *options)
    assert done.code == 0, done.err
    rows = json.loads(path.read_text())["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["baseline", "prompt", "vector", "null", "lever", "checkpoint"]
    assert rows[2]["score"] == 1.0 and rows[5]["score"] == rows[0]["score"]
    assert "baseline" in done.out and "Say Q." in done.out


def test_bake_writes_the_checkpoint(run: Any, model: Path, vector: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    done = run("bake", model, vector, "-o", out, "--json", tmp_path / "b.json")
    assert done.code == 0, done.err
    lm, baked = load(model), load(out)
    with load_steering(vector).on(lm):
        assert baked.generate("Where?", max_new_tokens=4) == lm.generate("Where?", max_new_tokens=4)
    assert json.loads((tmp_path / "b.json").read_text())["equal_text"] is True


def test_inspect_shows_origin_and_strength(run: Any, vector: Path, tmp_path: Path) -> None:
    done = run("inspect", vector, "--json", tmp_path / "i.json")
    assert done.code == 0
    assert "tiny" in done.out and "share of norm" in done.out and "10.0000" in done.out
    assert json.loads((tmp_path / "i.json").read_text())["alphas"] == {"3": pytest.approx(10.0)}
    prompt = PromptSteering("Be [bold]brief[/bold].").save(tmp_path / "p.safetensors")
    assert "Be [bold]brief[/bold]." in run("inspect", prompt).out


def test_demo_runs_the_demo_and_shows_each_behavior(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.report.page import Section
    from trimtab.results.tables import Table

    answers = Table("answers", ("before", "after"), (("[bold]b", "\x1b[31ma"),))
    section = Section("mood", ("It moves 50 %.",), (), (answers,), ("A doubt.",))
    data = {"model": "harbor", "seconds": 3.0, "behaviors": {"mood": {"strength": 1.0}}}
    asked: list[Any] = []

    def stand_in(out: Any, behaviors: Any, progress: Any, tell: Any) -> dict[str, Any]:
        asked.append((out, behaviors))
        tell(section)
        return data

    monkeypatch.setattr("trimtab.demo.run_demo", stand_in)
    done = run("demo", "--out", tmp_path / "r", "--json", tmp_path / "d.json")
    assert done.code == 0, done.err
    assert asked == [(tmp_path / "r", ("refusal", "topic", "mood"))]
    assert all(part in done.out for part in ("mood", "It moves 50 %.", "A doubt.", "[bold]b"))
    assert "\x1b" not in done.out
    assert json.loads((tmp_path / "d.json").read_text()) == data
    assert run("demo", "--all").code == 0 and len(asked[1][1]) == 7


BAD = {
    "no model": ("generate", "./nowhere", "Hello"),
    "no behavior": ("measure", "{model}", "no-such-behavior"),
    "no file": ("generate", "{model}", "Hello", "--with", "nowhere.safetensors"),
    "no vector": ("inspect", "{behavior}"),
    "layers": ("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--layers", "two"),
    "deep layer": ("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--layers", "40"),
    "method": ("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--method", "magic"),
    "scope": ("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--scope", "somewhere"),
    "out is a folder": ("find", "{model}", "{behavior}", "-o", "{tmp}"),
    "json is a folder": ("generate", "{model}", "Hello", "--json", "{tmp}"),
    "json below a file": ("inspect", "{vector}", "--json", "{behavior}/x.json"),
    "bake a prompt": ("bake", "{model}", "prompt:Hello", "-o", "{tmp}/b", "--json", "{tmp}/j"),
    "bake onto something": ("bake", "{model}", "{vector}", "-o", "{model}"),
    "strength": ("generate", "{model}", "Hi", "--with", "{vector}", "--strength", "nan"),
    "no such engine": ("measure", "{model}", "{behavior}", "--engine", "slurm"),
    "engine of no use": ("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--engine", "vllm"),
    "engine without workers": ("tune", "{model}", "{behavior}", "{vector}", "--workers", "2"),
    "a gap has no restarts": ("close-gap", "{model}", "{behavior}", "--restarts", "2"),
    "layers twice": (
        *("find", "{model}", "{behavior}", "-o", "{tmp}/v", "--layers", "1", "--each-layer", "1"),
    ),
    "behavior twice": ("find", "{model}", "mood,mood", "-o", "{tmp}/v"),
    "no such device": ("--device-map", "nonsense", "generate", "{model}", "Hello"),
    "too long": ("generate", "{model}", "", "--with", "{vector}", "--strength", "inf"),
    "no tokens": ("generate", "{model}", "Hello", "--max-new-tokens", "0"),
    "unknown option": ("generate", "{model}", "Hello", "--nonsense"),
    "unknown command": ("tune", "{model}"),
    "missing": ("find", "{model}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_exit_2_and_nothing_written(
    run: Any,
    case: str,
    model: Path,
    behavior: Path,
    vector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_DEVICE_MAP", "cpu")
    places = {"model": model, "behavior": behavior, "vector": vector, "tmp": tmp_path}
    before = files_in(model), behavior.read_bytes()
    done = run(*(part.format(**places) for part in BAD[case]))
    assert done.code == 2, done.err
    assert done.err.strip() and "Traceback" not in done.err and not done.out.strip()
    assert files_in(tmp_path) == set()
    assert (files_in(model), behavior.read_bytes()) == before
    assert os.environ["TRIMTAB_DEVICE_MAP"] == "cpu"  # an option is gone with its command


def test_no_command_shows_the_commands(run: Any) -> None:
    done = run()
    assert done.code == 2 and all(command in done.out for command in COMMANDS)


def test_a_vector_of_another_model_is_refused(run: Any, model: Path, tmp_path: Path) -> None:
    other = tiny.language_model("qwen2")
    path = planted.push(other).save(tmp_path / "other.safetensors")
    done = run("generate", model, "Hello", "--with", path)
    assert done.code == 2 and "fingerprint" in done.err


def test_an_internal_error_is_short_unless_debug_is_asked_for() -> None:
    script = (
        "import sys, trimtab.cli as cli\n"
        "def broken(path): raise RuntimeError('the pump is [bold]dry')\n"
        "import trimtab.steering.load as file\n"
        "file.describe = broken\n"
        "cli.main(sys.argv[1:])\n"
    )

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    short = start("inspect", "x")
    assert short.returncode == 1 and "Traceback" not in short.stderr
    assert "RuntimeError: the pump is [bold]dry" in short.stderr
    assert "trimtab --debug inspect x" in short.stderr
    long = start("--debug", "inspect", "x")
    assert long.returncode == 1 and "Traceback" in long.stderr


@pytest.mark.parametrize(
    ("text", "layers"), [("2", [2]), ("2,5", [2, 5]), ("2-5", [2, 3, 4, 5]), ("0, 3-4", [0, 3, 4])]
)
def test_layers_are_read(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "-1", "5-2", "1,", "a", "1.5", "²"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(TrimtabError, match="layers"):
        parse_layers(text)
