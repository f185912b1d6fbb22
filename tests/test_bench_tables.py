"""The page of tables is that of the kept results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_is_that_of_the_kept_results() -> None:
    spec = importlib.util.spec_from_file_location("bench_tables", ROOT / "bench" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    written = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert written == tables.page(), "run python bench/tables.py"
