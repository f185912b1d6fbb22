"""Draw the theorems and check them against brute force: `python -m tools.theorems --out theorems`.

Exit code 0 when every prediction holds, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tools.theorems.features_model import FeaturesModel
from tools.theorems.page import theory_section
from tools.theorems.theorems import theorems
from trimtab.report.page import write_page


def main(given: Sequence[str] | None = None) -> int:
    """Print the table, write the page and, if asked, all curves."""
    parser = argparse.ArgumentParser(prog="python -m tools.theorems", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("theorems"), help="the folder of the page")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=1, help="of the model")
    args = parser.parse_args(given)
    found = theorems(FeaturesModel.example(args.seed))
    Console().print(found.table())
    write_page(args.out, [theory_section(found)], title="How hard to pull", lead="theory")
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0 if all(check.holds for check in found.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
