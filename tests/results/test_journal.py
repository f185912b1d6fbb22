"""Journal: what was written is there again, what was cut off is not, and other work is refused."""

import math
from pathlib import Path

import pytest

from trimtab.errors import TrimtabError
from trimtab.results.journal import Journal

HEADER = {"work": "sweep", "vector": "a" * 64, "tokens": 40, "cap": None}


def test_entries_come_back_in_order_and_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    journal = Journal(path, HEADER)
    assert b'"format": "trimtab.journal"' in path.read_bytes().replace(b'":"', b'": "')
    entries = [{"m": 0.1 + 0.2, "text": "naïve\n✓"}, {"m": math.inf, "rows": [1, None]}]
    for entry in entries:
        journal.add(entry)
    assert journal.entries == entries == Journal(path, HEADER).entries
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_last_line_cut_off_is_dropped_and_can_be_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, HEADER)
    journal.add({"m": 1})
    journal.add({"m": 22222})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Journal(path, HEADER)
    assert again.entries == [{"m": 1}]
    again.add({"m": 22222})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 3, 30])
def test_a_header_cut_off_starts_anew(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, HEADER)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert Journal(path, HEADER).entries == []
    assert path.read_bytes() == whole


def test_other_work_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, HEADER).add({"m": 1})
    before = path.read_bytes()
    with pytest.raises(TrimtabError, match="tokens 40 instead of 41"):
        Journal(path, {**HEADER, "tokens": 41})
    with pytest.raises(TrimtabError, match="seed null instead of 1"):
        Journal(path, {**HEADER, "seed": 1})
    with pytest.raises(TrimtabError, match="tokens 40 instead of null"):
        Journal(path, {key: value for key, value in HEADER.items() if key != "tokens"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"my notes\n", b"my notes", b'{"m": 1}\n', b"[]\n", b"\xff\xfe\n"]
)
def test_a_file_of_the_users_is_never_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(TrimtabError):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, HEADER)
    journal.add({"m": 1})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"m"\n' + lines[1])
    with pytest.raises(TrimtabError, match="line 2"):
        Journal(path, HEADER)


def test_a_folder_cannot_be_a_journal(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="continue the journal"):
        Journal(tmp_path, HEADER)
