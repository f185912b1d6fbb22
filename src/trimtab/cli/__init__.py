"""The command line: each module is a command; it reads arguments, calls one public function, shows the result.

Help, usage errors and completion read these modules alone, so they import what is heavy (torch,
transformers and whatever uses them) inside the functions that run a command.
"""

from trimtab.cli import (
    audit,
    bake,
    close_gap,
    convert,
    demo,
    doctor,
    explain,
    export,
    fetch,
    find,
    generate,
    inspect,
    laws,
    levers,
    measure,
    search,
    serve,
    studio,
    tasks,
    tune,
)
from trimtab.cli.app import main

__all__ = [
    "audit",
    "bake",
    "close_gap",
    "convert",
    "demo",
    "doctor",
    "explain",
    "export",
    "fetch",
    "find",
    "generate",
    "inspect",
    "laws",
    "levers",
    "main",
    "measure",
    "search",
    "serve",
    "studio",
    "tasks",
    "tune",
]
