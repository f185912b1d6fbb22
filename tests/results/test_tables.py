"""Tables: three renderings of one grid, escaping, strict and atomic JSON."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.results.tables import (
    Printable,
    Table,
    clean,
    number,
    percent,
    to_plain,
    with_interval,
    write_json,
)

NASTY = "<script>alert(1)</script> [bold]x[/bold] \x1b[31m\u202e\"'&"


@dataclasses.dataclass(frozen=True)
class Result(Printable):
    name: str
    values: torch.Tensor
    missing: float | None = None

    def table(self) -> Table:
        return Table("Result", ("name", "mean"), ((self.name, number(0.25)),), ("a note",))


def test_every_rendering_shows_the_same_cells() -> None:
    result = Result("plain", torch.tensor([0.25]))
    for text in (str(result), result._repr_html_()):
        assert "plain" in text and "0.25" in text and "a note" in text and "Result" in text


def test_hostile_text_stays_text() -> None:
    result = Result(NASTY, torch.tensor([0.25]))
    page = result._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page and "&quot;&#x27;&amp;" in page
    text = str(result)
    assert "[bold]x[/bold]" in text  # literal, not markup
    assert "\x1b" not in text and "\u202e" not in text


def test_clean_keeps_line_breaks_tabs_and_other_scripts() -> None:
    assert clean("a\nb\tc é 漢字 🙂") == "a\nb\tc é 漢字 🙂"


def test_a_ragged_grid_is_refused() -> None:
    with pytest.raises(AssertionError, match="silently pad"):
        Table("t", ("a", "b"), (("1",),))


def test_to_dict_is_plain_and_strict_json() -> None:
    result = Result("x", torch.tensor([1.0, math.nan, math.inf]))
    assert result.to_dict() == {"name": "x", "values": [1.0, None, None], "missing": None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_to_plain_reaches_into_everything() -> None:
    value = {1: (np.float32(0.5), np.int64(3), {"b", "a"}), "p": Path("a/b"), "t": True}
    assert to_plain(value) == {"1": [0.5, 3, ["a", "b"]], "p": "a/b", "t": True}
    with pytest.raises(TrimtabError, match="object"):
        to_plain(object())


def test_save_and_read_back(tmp_path: Path) -> None:
    result = Result("ü", torch.tensor([0.5]))
    path = result.save(tmp_path / "deep" / "result.json")
    assert json.loads(path.read_text(encoding="utf-8")) == result.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"v": 1})
    with pytest.raises(TrimtabError):
        write_json(path, {"v": object()})
    assert json.loads(path.read_text()) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrimtabError, match="to write"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (math.nan, "–"), (0.0, "0.00"), (0.934, "0.93"), (0.0004, "4.0e-04")],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_intervals_and_percentages() -> None:
    assert with_interval(0.5, 0.25, 0.75) == "0.50 [0.25, 0.75]"
    assert with_interval(0.5, None, None) == "0.50"
    assert with_interval(None, 0.1, 0.2) == "–"
    assert percent(0.956) == "96 %"
