"""The command line: each module is a command; it reads arguments, calls one public function, shows the result."""

from trimtab.cli import (
    audit,
    bake,
    demo,
    export,
    find,
    generate,
    inspect,
    laws,
    measure,
    search,
    tune,
)
from trimtab.cli.app import main

__all__ = [
    "audit",
    "bake",
    "demo",
    "export",
    "find",
    "generate",
    "inspect",
    "laws",
    "main",
    "measure",
    "search",
    "tune",
]
