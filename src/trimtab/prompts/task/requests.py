"""Requests of a prompt search: what users ask, split into train, validation and test."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.located import Located, read_text, refuse_in
from trimtab.behaviors.parts import BehaviorError, Example, examples_at, shown
from trimtab.behaviors.yaml import read_yaml
from trimtab.errors import TrimtabError
from trimtab.models.chat import Prompt

BUILT_IN = Path(__file__).parents[2] / "harbor" / "prompts" / "requests.yaml"
SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION = 0.375, 0.25  # shares of a flat list; the rest is for the test
# A prefix is such a text itself: what is asked about "the above" would be asked about the prefix.
_BACKWARDS = re.compile(
    r"\b(the (above|previous|preceding|foregoing|earlier|last) (text|message|sentence|line|words?"
    r"|instructions?|prompt|answer|question|paragraph)s?|as above|what (i|you|was) (just )?"
    r"(said|wrote|told|written)|(said|written|mentioned|stated) (above|before|earlier)"
    r"|this (text|sentence|message|prompt)|(your|my) (instructions?|prompt|last (message|answer))"
    r"|repeat (that|after me|everything)|translate (this|that|it))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Requests:
    """Prompts in three splits: `train` finds, `validation` selects, `test` scores.

    Attributes:
        train: strings (a user turn each) or conversations.
        validation: the same; disjoint from the others.
        test: the same.
        left_out: requests of a flat list that talk about the text before them.

    Raises:
        TrimtabError: An empty split, something that is no prompt, or one prompt in two splits.
    """

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    left_out: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        """Bring prompts to one form and check the splits."""
        seen: dict[str, str] = {}
        for split in SPLITS:
            examples = examples_at(getattr(self, split), split)
            if not examples:
                raise BehaviorError((split,), "an empty split", "give at least one request")
            for number, example in enumerate(examples):
                other = seen.setdefault(example.key, split)
                if other != split:
                    raise BehaviorError(
                        (split, number),
                        f"a request that is also in {other}",
                        "leave it in one split only",
                    )
            object.__setattr__(self, split, tuple(e.prompt for e in examples))


def refers_back(prompt: Prompt) -> bool:
    """Say whether a request asks about the text before it, which a prefix would change."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return _BACKWARDS.search(text) is not None


def split_requests(prompts: Sequence[Prompt], seed: int = 0) -> Requests:
    """Split a flat list by a seed; duplicates and requests about the text before them go.

    Raises:
        TrimtabError: fewer than three usable requests.
    """
    examples = [example.prompt for example in dict.fromkeys(map(Example, prompts))]
    kept = [prompt for prompt in examples if not refers_back(prompt)]
    if len(kept) < len(SPLITS):
        raise TrimtabError(
            asked=f"three splits of {len(prompts)} requests",
            found=f"{len(kept)} different ones that do not talk about the text before them",
            advice="give at least 3 requests (60 and more give useful figures)",
        )
    random.Random(seed).shuffle(kept)
    n = len(kept)
    train = min(max(1, round(n * TRAIN)), n - 2)
    end = train + min(max(1, round(n * VALIDATION)), n - train - 1)
    out = tuple(prompt for prompt in examples if refers_back(prompt))
    return Requests(tuple(kept[:train]), tuple(kept[train:end]), tuple(kept[end:]), left_out=out)


def load_requests(name_or_path: str | PathLike[str], seed: int = 0) -> Requests:
    """Load requests: `harbor`, a YAML file or a text file with one request per line.

    A YAML file holds `train:`, `validation:` and `test:`, or one flat list, which `split_requests`
    splits (docs/search.md).

    Args:
        name_or_path: the built-in name `harbor`, or a `.yaml`, `.yml` or `.txt` file.
        seed: of the split of a flat list.

    Raises:
        TrimtabError: no such file, or one that holds no requests, with `file:line`.
    """
    path = BUILT_IN if name_or_path == "harbor" else Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".txt") or not path.is_file():
        raise TrimtabError(
            asked=f"the requests {str(name_or_path)!r}",
            found="no such file" if not path.exists() else "no .yaml, .yml or .txt file",
            advice="give harbor (built in), or a file as docs/search.md describes",
        )
    text = read_text(path, "docs/search.md")
    if path.suffix == ".txt":
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        located = Located([line for _, line in lines], lambda at: _line_of(lines, at))
    else:
        located = read_yaml(text, path)
    try:
        return _build(located.content, path, seed)
    except BehaviorError as error:
        raise refuse_in(located, path, error) from error


def _line_of(lines: Sequence[tuple[int, str]], location: Sequence[str | int]) -> int:
    index = next((part for part in location if isinstance(part, int)), 0)
    return lines[index][0] if index < len(lines) else 1


def _build(content: Any, path: Path, seed: int) -> Requests:
    if isinstance(content, Mapping):
        for key in content:
            if key not in SPLITS:
                advice = f"allowed: {', '.join(SPLITS)}"
                raise BehaviorError((str(key),), f"unknown key {key!r}", advice)
        for split in SPLITS:
            if split not in content:
                advice = "give all three splits, or one flat list"
                raise BehaviorError((), f"no {split!r}", advice)
        return Requests(**{split: content[split] for split in SPLITS})
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise BehaviorError((), shown(content), "give train:, validation: and test:, or a list")
    prompts = [_prompt(item, index) for index, item in enumerate(content)]
    return split_requests(prompts, seed)


def _prompt(item: object, index: int) -> Prompt:
    try:
        return examples_at([item], "")[0].prompt
    except BehaviorError as error:
        raise BehaviorError((index, *error.location[2:]), error.found, error.advice) from error


def behavior_requests(behavior: Behavior, seed: int = 0) -> Requests:
    """Split a behavior's plain requests, or its `away` prompts where it has none.

    Prompts with a system message are left out: it would speak against the prefix.

    Raises:
        TrimtabError: fewer than three of them.
    """
    examples = behavior.requests or behavior.away
    plain = [e.prompt for e in examples if isinstance(e.prompt, str) or len(e.prompt) == 1]
    return split_requests(plain, seed)
