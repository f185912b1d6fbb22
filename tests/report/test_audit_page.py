"""The audit's page and command: what is drawn is what was measured, and text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import planted
import tiny
from cli.test_cli import Ran
from report.test_report import EVIL, Page
from trimtab.margins import AuditReport, audit
from trimtab.models.model import LanguageModel
from trimtab.report.audit_page import audit_sections, write_audit_page

WORDS = {"toward": ["Z", "Kite only"], "away": ["Q"]}
TITLES = [
    "Gap over prompts",
    "Census of first tokens",
    "What the readout words became",
    "First-order radius",
    "KL to close the gap",
]


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    return planted.language_model(), tiny.language_model("llama", seed=1)


@pytest.fixture(scope="module")
def report(models: tuple[LanguageModel, LanguageModel]) -> AuditReport:
    return audit(models[0], planted.behavior(10, readout=WORDS), against=models[1])


def test_sections_draw_what_was_measured(report: AuditReport) -> None:
    sections = audit_sections(report)
    assert [section.title for section in sections] == TITLES
    gaps, census, words, radius, closing = sections
    assert len(gaps.figures) == len(report.gap.sides)
    for figure, side in zip(gaps.figures, report.gap.sides, strict=True):
        assert len(figure["data"]) == 2  # both checkpoints over each other
        for trace in figure["data"]:
            assert sum(trace["y"]) == pytest.approx(2.0, abs=1e-5)  # each step has two corners
        found = report.gap.sides[side].values["logsumexp"]
        assert min(figure["data"][0]["x"]) <= min(found) + 1e-5
    bars = census.figures[0]["data"]
    assert bars[0]["x"] == pytest.approx([one.toward.share for one in report.census.sides.values()])
    assert len(words.tables) == 1  # one tokenizer, one table
    assert any("first of" in row[-1] for row in words.tables[0].rows)
    medians = [one.relative.median for one in report.radius.sides["toward"]]
    assert radius.figures[0]["data"][0]["y"] == pytest.approx(medians)
    expected = [row.kl.median for row in report.kl_to_close.rows]
    drawn = closing.figures[0]["data"][0]["x"]
    for value, shown in zip(expected, drawn, strict=True):
        assert shown is None or shown == pytest.approx(value)
    assert any(shown is not None for shown in drawn)


def test_answers_outside_both_sets_are_warned_about(report: AuditReport) -> None:
    warnings = audit_sections(report)[1].warnings
    shares = [report.census.sides[side].neither.share for side in ("toward", "away")]
    assert max(shares) > 0.25 and any("neither set" in text for text in warnings)


def test_model_text_does_not_break_out(tmp_path: Path, models) -> None:
    lm, other = models
    named = LanguageModel(lm.model, lm.tokenizer, EVIL)
    report = audit(named, planted.behavior(10, readout={"toward": [EVIL], "away": ["Q"]}))
    page = Page(write_audit_page(tmp_path / "page", report).read_text())
    assert [a["src"] for _, a in page.tags if a.get("src")] == ["plotly.min.js"]
    plain = audit(lm, planted.behavior(10, readout={"toward": ["<"], "away": ["Q"]}))
    usual = Page(write_audit_page(tmp_path / "usual", plain).read_text())
    names = {tag for tag, _ in page.tags}
    assert names == {tag for tag, _ in usual.tags}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, models) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("audit")
    for name, lm in zip(("one", "two"), models, strict=True):
        lm.model.save_pretrained(root / name)
        lm.tokenizer.save_pretrained(root / name)
    content = planted.behavior(10, readout=WORDS).to_dict()
    file = root / "opening.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v not in (None, [])}))
    return root / "one", root / "two", file


def test_the_command(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], models
) -> None:
    one, two, file = folders
    out, page = tmp_path / "audit.json", tmp_path / "page"
    ran = Ran(
        capsys, "audit", one, file, "--against", two, "--json", out, "--report", page,
        "--aggregator", "max", "--max-prompts", 2,
    )  # fmt: skip
    assert ran.code == 0 and "refusal-affirmation gap D0" in " ".join(ran.out.split())
    assert (page / "index.html").is_file() and (page / "plotly.min.js").is_file()
    data = json.loads(out.read_text())
    assert data["gap"]["aggregator"] == "max" and data["compared"]["other"] == str(two)
    expected = audit(
        models[0], planted.behavior(10, readout=WORDS), aggregator="max", max_prompts=2
    )
    values = data["gap"]["sides"]["toward"]["values"]["max"]
    assert values == pytest.approx(expected.gap.sides["toward"].values["max"], abs=1e-4)
    assert len(values) == 2
    before = torch.tensor(data["compared"]["gap"]["sides"]["toward"]["values"]["max"])
    difference = torch.tensor(data["compared"]["difference"]["toward"]["values"])
    torch.testing.assert_close(difference, torch.tensor(values) - before)


def test_a_bad_option_is_refused_before_anything_is_loaded(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, "audit", tmp_path / "none", folders[2], "--aggregator", "mean")
    assert ran.code == 2 and "no such aggregator" in ran.err and "none" not in ran.err
