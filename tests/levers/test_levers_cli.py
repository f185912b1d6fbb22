"""`trimtab levers`: one table, one sentence, one page; bad input leaves with 2 and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import planted
from cli.test_cli import Ran
from report.test_report import Page

QUICK = ("--max-prompts", "2", "--max-new-tokens", "4", "--nulls", "1", "--budget", "0.6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a behavior and a vector on disk."""
    made = tmp_path_factory.mktemp("levers")
    lm = planted.language_model()
    lm.model.save_pretrained(made / "model")
    lm.tokenizer.save_pretrained(made / "model")
    chosen = planted.behavior(
        9, readout={"toward": ["Z"], "away": ["Q"]}, prompt_toward="Say Z.<b>bold</b>"
    )
    content = {k: v for k, v in chosen.to_dict().items() if v not in (None, [])}
    (made / "opening.yaml").write_text(yaml.safe_dump(content))
    planted.push(lm, scope="all").save(made / "push.safetensors")
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: Ran(capsys, *arguments)


def test_help_has_an_example(run: Any) -> None:
    done = run("levers", "--help")
    assert done.code == 0 and "Example: trimtab levers" in done.out


def test_table_sentence_json_and_page(run: Any, folder: Path, tmp_path: Path) -> None:
    page, facts = tmp_path / "page", tmp_path / "levers.json"
    given = ("--vector", folder / "push.safetensors", "--prompt", "prefix:Say Z.")
    done = run(
        "levers", folder / "model", folder / "opening.yaml", *given, *QUICK,
        "--report", page, "--json", facts,
    )  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads(facts.read_text())
    assert written["budget"] == 0.6 and written["sign"] == 1
    names = [row["name"] for row in written["rows"]]
    assert names[0] == "unsteered" and {"bias", "LoRA", "soft prompt", "random"} < set(names)
    sentence = written["advice"]["sentence"]
    assert " ".join(sentence.split()) in " ".join(done.out.split())
    html = (page / "index.html").read_text()
    assert "<b>bold</b>" not in html
    assert "what each lever is" in Page(html).shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "0"), "above 0"),
        (("--vector", "missing.safetensors"), "missing.safetensors"),
        (("--prompt", "push.safetensors"), "a vector"),
        (("--json", "."), "a folder of that name"),
    ],
)
def test_bad_input_is_one_message(
    run: Any, folder: Path, tmp_path: Path, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(folder)
    done = run("levers", "model", "opening.yaml", *arguments, "--report", tmp_path / "page")
    assert done.code == 2 and message in done.err
    assert "Traceback" not in done.err and not (tmp_path / "page").exists()


def test_unknown_model_and_behavior(run: Any, folder: Path) -> None:
    assert run("levers", folder / "none", folder / "opening.yaml").code == 2
    assert run("levers", folder / "model", "no-such-behavior").code == 2
