"""The examples run as they are on the built-in model, and show what they say they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from run_examples import run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Smaller than the defaults where that saves seconds.
ARGUMENTS = {
    "steer.py": (),
    "tune_and_bake.py": ("--max-prompts", "6"),
    "find_a_circuit.py": ("--max-new-tokens", "4"),
    "audit_two_checkpoints.py": ("--max-prompts", "4"),
    "write_a_behavior.py": (),
    "first_steps.ipynb": (),
    "vector_against_prompt.ipynb": (),
}
REFUSAL = "I cannot help you borrow the rowboat."
# All of them run in one fixture: a minute of one core, more where others work on it.
pytestmark = pytest.mark.timeout(1200)


Ran = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run all of them in a process of their own, in an empty folder."""
    programs = [[str(EXAMPLES / name), *more] for name, more in ARGUMENTS.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_examples.py")],
        input=json.dumps(programs),
        cwd=tmp_path_factory.mktemp("reader"),
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(ARGUMENTS, json.loads(done.stdout), strict=True))


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == set(
        ARGUMENTS
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_to_its_end(name: str, ran: Ran) -> None:
    assert not ran[name]["failed"]
    assert ran[name]["printed"]


def test_steering_turns_the_answer_and_strength_0_does_not(ran: Ran) -> None:
    answers = ran["steer.py"]["printed"].splitlines()
    assert [REFUSAL in answer for answer in answers] == [False, False, True, True]


def test_the_baked_checkpoint_answers_as_the_steered_model(ran: Ran) -> None:
    found = re.findall(r"^(?:steered|baked): +(.*)$", ran["tune_and_bake.py"]["printed"], re.M)
    assert len(found) == 2 and found[0] == found[1] and REFUSAL in found[0]


def test_the_circuit_carries_more_than_random_edges(ran: Ran) -> None:
    table = ran["find_a_circuit.py"]["printed"].partition("Minimal circuit")[2]
    rows = re.findall(r"│ (highest|random)[^│]*│ +\d+ │ +(-?[\d.]+)", table)
    faithfulness = [float(number) for _, number in rows]
    assert [kind for kind, _ in rows] == ["highest", "random", "random", "random"]
    assert faithfulness[0] > 0.8 > 0.5 > max(faithfulness[1:])


def test_the_hardened_checkpoint_has_the_wider_margin(ran: Ran) -> None:
    table = ran["audit_two_checkpoints.py"]["printed"].partition(" against ")[2]
    row = re.search(r"│ toward +│ 4 │ +[\d.]+ │ ([\d.]+) \[([\d.]+), ", table)
    assert row and 0.2 < float(row[2]) < float(row[1]) < 0.5


def test_the_written_behavior_is_measured_against_its_prompt(ran: Ran) -> None:
    table = ran["write_a_behavior.py"]["printed"]
    rows = re.findall(r"│ (baseline|prompt|brief|random)[^│]*│ toward │[^│]*│[^│]*│ +([\d.]+)", table)
    assert [name for name, _ in rows] == ["baseline", "prompt", "brief", "random"]
    baseline, prompt, vector, null = (float(score) for _, score in rows)
    assert baseline == null == 0 and prompt > 0.5 and vector > 0.5


def test_a_notebook_shows_its_results_as_tables(ran: Ran) -> None:
    shown = ran["first_steps.ipynb"]["printed"]
    assert "<caption>refusal, toward: validation curve</caption>" in shown
    assert "<caption>refusal: levers on the test split of harbor</caption>" in shown
    assert REFUSAL in shown.partition("<table>")[0]
    assert "VectorSteering(refusal mean_difference m=" in shown.splitlines()[-1]


def cells(table: str) -> dict[str, list[str]]:
    """First cell -> all cells, of every row of an HTML table."""
    rows = re.findall("<tr>(.*?)</tr>", table)
    split = [re.findall("<td>(.*?)</td>", row) for row in rows]
    return {row[0]: row for row in split if row}


def test_what_the_notebook_says_of_vector_and_prompt_holds(ran: Ran) -> None:
    shown = ran["vector_against_prompt.ipynb"]["printed"]
    curve, measured, _ = shown.split("<table>")[1:]
    curve = {m: row[3] for m, row in cells(curve).items()}
    assert "1.00" not in curve["+6"].split() and curve["+8"].startswith("1.00")
    rows = {name.split()[0]: row[4:] for name, row in cells(measured).items()}
    rows["mine"] = cells(measured)["prompt &quot;Decline every request.&quot;"][4:]
    figures = {name: [float(row[i].split()[0]) for i in (0, -2, -1)] for name, row in rows.items()}
    (score, damage, spill), prompt = figures["refusal"], figures["mine"]
    assert score == prompt[0] == 1 and figures["random"][0] == 0
    assert damage > prompt[1] and spill < prompt[2]
    answers = dict(line.split(": ", 1) for line in shown.splitlines()[-4:])
    refused = [name for name, answer in answers.items() if re.search("cannot|decline", answer)]
    assert refused == ["vector", "prompt", "both"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    named = [cell["id"] for cell in notebook["cells"]]
    assert len(set(named)) == len(named) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in named)
    for cell in notebook["cells"]:
        code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        assert cell == {**cell, "metadata": {}, **code}
        assert set(cell) == {"cell_type", "id", "metadata", "source", *code}


def test_what_fails_is_told(tmp_path: Path) -> None:
    script, notebook = tmp_path / "broken.py", tmp_path / "broken.ipynb"
    script.write_text("print('so far')\nraise SystemExit(2)\n")
    notebook.write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": ["x = 1\n", "x + y"]}]})
    )
    assert run(str(script)) == {"printed": "so far\n", "failed": "exit code 2"}
    assert "NameError: name 'y'" in run(str(notebook))["failed"]
