"""Every block of the README and of the documentation runs, as a reader would run the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.reader import ROOT, Reader

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    started, processor = time.perf_counter(), time.process_time()
    ran = Reader(tmp_path).read(page.read_text())
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    figures = f"{ran} blocks, {seconds:.0f} s, {processor:.0f} s of this process"
    record_property(str(page.relative_to(ROOT)), figures)
