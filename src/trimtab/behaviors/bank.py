"""The bank of everyday requests: what people ask in general, for contrasts and for measuring."""

from __future__ import annotations

from pathlib import Path

import yaml

from trimtab.models.chat import Prompt

FILE = Path(__file__).with_name("requests.yaml")


def everyday_requests(*kinds: str) -> list[Prompt]:
    """Return the requests of some kinds, all of them without: `plain`, `longer`, `two_turn`.

    The first two are text; of a conversation of two turns the assistant's first answer is given.
    """
    held = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    found: list[Prompt] = []
    for kind in kinds or held:
        for request in held[kind]:
            turns = zip(("user", "assistant", "user"), request, strict=True)
            found.append(
                request
                if isinstance(request, str)
                else [{"role": role, "content": text} for role, text in turns]
            )
    return found
