"""Runs scripts and notebooks in turn, each as a `__main__` of its own, as a reader would.

One process for all of them, since most of the time of a process of its own would go into importing
torch. Reads a JSON list of [path, *arguments] from standard input; writes a JSON list of what each
printed, with how it ended.
"""

from __future__ import annotations

import ast
import io
import json
import runpy
import sys
import traceback
from contextlib import redirect_stdout
from typing import Any


def run_notebook(path: str) -> None:
    """Run the code cells in one namespace; show a cell's last value as a notebook would."""
    with open(path, encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]), f"cell {number}").body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
            shown = getattr(value, "_repr_html_", lambda value=value: repr(value))()
            sys.stdout.write(f"Out[{number}]: {shown}\n")


def run(path: str, *arguments: str) -> dict[str, str]:
    """Run one program to its end; what it printed, and the traceback if it failed."""
    printed, failed = io.StringIO(), ""
    sys.argv = [path, *arguments]
    with redirect_stdout(printed):
        try:
            run_notebook(path) if path.endswith(".ipynb") else runpy.run_path(path, {}, "__main__")
        except SystemExit as left:
            failed = f"exit code {left.code}" if left.code else ""
        except Exception:
            failed = traceback.format_exc()
    return {"printed": printed.getvalue(), "failed": failed}


if __name__ == "__main__":
    json.dump([run(*program) for program in json.load(sys.stdin)], sys.stdout)
