"""Behavior: what is to change, as a contrast of prompts, with how it is read and judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.behaviors.parts import (
    BehaviorError,
    Example,
    JudgeSpec,
    Readout,
    examples_at,
    readout_at,
    refuse,
    shown,
    spec_at,
    text_at,
)
from trimtab.behaviors.split import EXAMPLE_LISTS, NAMES, split
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.models.chat import Message

__all__ = ["Behavior", "BehaviorError", "Example", "JudgeSpec", "Readout", "Splits"]

Listed: TypeAlias = "Iterable[Example | str | Sequence[Message] | Mapping[str, Any]]"


@dataclass(frozen=True, init=False)
class Behavior:
    """What is to change: prompts that show it (`toward`) and prompts that do not (`away`).

    Attributes:
        name: short name, used in tables and file names.
        toward: prompts whose answers show the behavior.
        away: prompts whose answers show the opposite, or simply not the behavior.
        description: one sentence for readers.
        neutral: prompts that have nothing to do with it; spill is measured on them.
        requests: plain requests that call for neither side, for behaviors whose `away` prompts
            demand the opposite in so many words.
        readout: words whose log-odds at the first answer position tell the sides apart.
        judge: what scores answers; coherence: what scores their soundness.
        prompt_toward: a system prompt that asks for the behavior: the plain-prompt baseline.
        prompt_away: a system prompt that asks for the opposite.
        paired: whether `toward[i]` and `away[i]` belong together.
    """

    name: str
    toward: tuple[Example, ...]
    away: tuple[Example, ...]
    description: str
    neutral: tuple[Example, ...]
    requests: tuple[Example, ...]
    readout: Readout | None
    judge: JudgeSpec | None
    coherence: JudgeSpec | None
    prompt_toward: str | None
    prompt_away: str | None
    paired: bool

    def __init__(
        self,
        name: str,
        toward: Listed,
        away: Listed,
        description: str = "",
        neutral: Listed = (),
        readout: Readout | Mapping[str, Sequence[str]] | None = None,
        judge: JudgeSpec | Mapping[str, Any] | str | None = None,
        coherence: JudgeSpec | Mapping[str, Any] | str | None = None,
        prompt_toward: str | None = None,
        prompt_away: str | None = None,
        paired: bool | None = None,
        requests: Listed = (),
    ) -> None:
        """Coerce plain values to their types and check them.

        Args:
            name: short name.
            toward: strings (a user turn each), message lists, `{"prompt", "completion"}` dicts or
                Examples.
            away: the other side.
            description: one sentence.
            neutral: prompts that have nothing to do with the behavior.
            readout: a Readout or `{"toward": [...], "away": [...]}`.
            judge: a JudgeSpec, a kind, or `{"kind": ..., option: value}`.
            coherence: the same for the coherence scorer.
            prompt_toward: system prompt that asks for the behavior.
            prompt_away: system prompt that asks for the opposite.
            paired: `toward[i]` belongs to `away[i]`; by default when the sides are equally long.
            requests: plain requests that call for neither side.

        Raises:
            TrimtabError: an empty side, an example on both sides, something that is not text, or
                `paired` with sides of different lengths.
        """
        put = object.__setattr__  # the class is frozen
        put(self, "name", text_at(name, ("name",)).strip())
        if not isinstance(description, str):
            refuse(("description",), shown(description), "give text")
        put(self, "description", description)
        for field, listed in (("toward", toward), ("away", away)):
            put(self, field, examples_at(listed, field))
            if not getattr(self, field):
                refuse((field,), "an empty list", "give prompts on both sides")
        put(self, "neutral", examples_at(neutral, "neutral"))
        put(self, "requests", examples_at(requests, "requests"))
        put(self, "readout", readout_at(readout))
        put(self, "judge", spec_at(judge, "judge"))
        put(self, "coherence", spec_at(coherence, "coherence"))
        for field, text in (("prompt_toward", prompt_toward), ("prompt_away", prompt_away)):
            put(self, field, None if text is None else text_at(text, (field,)))
        self._check_sides(paired)

    def _check_sides(self, paired: bool | None) -> None:
        equal = len(self.toward) == len(self.away)
        if paired is not None and not isinstance(paired, bool):
            refuse(("paired",), shown(paired), "give true or false")
        if paired and not equal:
            refuse(
                ("paired",),
                f"{len(self.toward)} toward and {len(self.away)} away",
                "give one away example for each toward example, or leave `paired` out",
            )
        object.__setattr__(self, "paired", equal if paired is None else paired)
        toward = {(e.key, e.completion) for e in self.toward}
        for i, example in enumerate(self.away):
            if (example.key, example.completion) in toward:
                same = toward == {(e.key, e.completion) for e in self.away}
                refuse(
                    ("away",) if same else ("away", i),
                    "the same examples on both sides" if same else "an example that is also toward",
                    "a contrast needs two different sides; leave each example on one of them",
                )

    def __hash__(self) -> int:
        """Equal behaviors have equal content."""
        return hash(self.data_hash)

    @property
    def data_hash(self) -> str:
        """SHA-256 of the content, in hex; any change of a prompt, judge or order changes it."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()

    def split(
        self, seed: int = 0, fractions: tuple[float, float, float] = (0.5, 0.25, 0.25)
    ) -> Splits:
        """Return disjoint train, validation and test behaviors.

        Pairs stay together, and so do all examples with the same prompt, on whichever list they
        are. Every split gets examples of both sides; `neutral` and `requests` are split likewise,
        but a list of fewer than three leaves splits without any.

        Args:
            seed: of the shuffle; the order of the examples matters too.
            fractions: shares of train, validation and test, positive, summing to 1.

        Raises:
            TrimtabError: unusable fractions, or fewer than three different prompts (or pairs) a
                side.
        """
        lists = {name: [e.key for e in getattr(self, name)] for name in EXAMPLE_LISTS}
        chosen = split(self.name, lists, self.paired, seed, fractions)
        return Splits(*map(self.select, chosen))

    def select(self, kept: Mapping[str, Sequence[int]]) -> Behavior:
        """Return the behavior with only these examples, as indices per list; the rest stays."""
        lists = {f: [getattr(self, f)[i] for i in kept.get(f, ())] for f in EXAMPLE_LISTS}
        return Behavior(**{**self.to_dict(), **lists})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; `Behavior(**d)` gives an equal behavior back."""
        return {
            "name": self.name,
            "description": self.description,
            "toward": [e.to_dict() for e in self.toward],
            "away": [e.to_dict() for e in self.away],
            "neutral": [e.to_dict() for e in self.neutral],
            "requests": [e.to_dict() for e in self.requests],
            "readout": self.readout
            and {"toward": list(self.readout.toward), "away": list(self.readout.away)},
            "judge": self.judge and self.judge.to_dict(),
            "coherence": self.coherence and self.coherence.to_dict(),
            "prompt_toward": self.prompt_toward,
            "prompt_away": self.prompt_away,
            "paired": self.paired,
        }

    def __repr__(self) -> str:
        """Name and sizes: the prompts themselves would fill the screen."""
        pairs = "pairs" if self.paired else "unpaired"
        return (
            f"Behavior({self.name!r}: {len(self.toward)} toward, {len(self.away)} away ({pairs}), "
            f"{len(self.neutral)} neutral)"
        )


@dataclass(frozen=True)
class Splits:
    """Three behaviors with disjoint prompts: `train` finds, `validation` selects, `test` scores."""

    train: Behavior
    validation: Behavior
    test: Behavior

    def named(self, name: str) -> Behavior:
        """Return a split by its name.

        Raises:
            TrimtabError: a name other than train, validation and test.
        """
        if name not in NAMES:
            raise TrimtabError(
                f"the split {name!r}", f"the splits {', '.join(NAMES)}", "name one of these"
            )
        return getattr(self, name)
