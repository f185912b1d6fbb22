"""Behavior: what is to change, as a contrast of prompts, with how it is read and judged."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationInfo

from trimtab.behaviors.bank import everyday_requests
from trimtab.behaviors.instruction import Place, instructed
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
from trimtab.models.chat import Message

__all__ = ["Behavior", "BehaviorError", "Example", "JudgeSpec", "Readout", "Splits"]

LONGEST = 2000  # characters of an instruction: more is a text, not a request
NEUTRAL = 24  # requests set aside for spill

Listed: TypeAlias = Iterable[Example | str | Sequence[Message] | Mapping[str, Any]]


def _description(given: object) -> str:
    if not isinstance(given, str):
        refuse(("description",), shown(given), "give text")
    return given


def _side(given: object, info: ValidationInfo) -> tuple[Example, ...]:
    side = examples_at(given, str(info.field_name))
    if not side:
        refuse((str(info.field_name),), "an empty list", "give prompts on both sides")
    toward = {(e.key, e.completion) for e in info.data.get("toward", ())}
    for i, example in enumerate(side):
        if (example.key, example.completion) in toward:
            same = toward == {(e.key, e.completion) for e in side}
            refuse(
                ("away",) if same else ("away", i),
                "the same examples on both sides" if same else "an example that is also toward",
                "a contrast needs two different sides; leave each example on one of them",
            )
    return side


def _paired(given: object, info: ValidationInfo) -> bool:
    toward, away = (len(info.data.get(side, ())) for side in ("toward", "away"))
    if given is not None and not isinstance(given, bool):
        refuse(("paired",), shown(given), "give true or false")
    if given and toward != away:
        refuse(
            ("paired",),
            f"{toward} toward and {away} away",
            "give one away example for each toward example, or leave `paired` out",
        )
    return toward == away if given is None else given


Name = Annotated[str, PlainValidator(lambda given: text_at(given, ("name",)).strip())]
Side = Annotated[tuple[Example, ...], PlainValidator(_side)]
Examples = Annotated[
    tuple[Example, ...],
    PlainValidator(lambda given, info: examples_at(given, str(info.field_name))),
]
Spec = Annotated[
    JudgeSpec | None, PlainValidator(lambda given, info: spec_at(given, str(info.field_name)))
]
Prompted = Annotated[
    str | None,
    PlainValidator(
        lambda given, info: None if given is None else text_at(given, (str(info.field_name),))
    ),
]


class Behavior(BaseModel):
    """What is to change: prompts that show it (`toward`) and prompts that do not (`away`).

    Prompts are given as strings (a user turn each), message lists, `{"prompt", "completion"}` dicts
    or Examples; a judge as a JudgeSpec, a kind, or `{"kind": ..., option: value}`.

    Attributes:
        name: short name, used in tables and file names.
        toward: prompts whose answers show the behavior.
        away: prompts whose answers show the opposite, or simply not the behavior.
        description: one sentence for readers.
        neutral: prompts that have nothing to do with it; spill is measured on them.
        readout: words whose log-odds at the first answer position tell the sides apart: a Readout
            or `{"toward": [...], "away": [...]}`.
        judge: what scores answers.
        coherence: what scores their soundness.
        prompt_toward: a system prompt that asks for the behavior: the plain-prompt baseline.
        prompt_away: a system prompt that asks for the opposite.
        paired: whether `toward[i]` and `away[i]` belong together; by default when the sides are
            equally long.
        requests: plain requests that call for neither side, for behaviors whose `away` prompts
            demand the opposite in so many words.

    Raises:
        TrimtabError: an empty side, an example on both sides, something that is not text, or
            `paired` with sides of different lengths.
    """

    model_config = ConfigDict(frozen=True)

    name: Name
    toward: Side
    away: Side
    description: Annotated[str, PlainValidator(_description)]
    neutral: Examples
    readout: Annotated[Readout | None, PlainValidator(readout_at)]
    judge: Spec
    coherence: Spec
    prompt_toward: Prompted
    prompt_away: Prompted
    paired: Annotated[bool, PlainValidator(_paired)]
    requests: Examples

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
        # Spelled out because fields hold less than they are made from, and may be given by position.
        given = locals()
        super().__init__(**{field: given[field] for field in type(self).model_fields})

    @classmethod
    def from_instruction(
        cls,
        toward: str,
        away: str | None = None,
        *,
        requests: Listed | None = None,
        where: Place = "after",
        judge: JudgeSpec | Mapping[str, Any] | str | None = None,
        examples: int = 80,
        name: str | None = None,
    ) -> Behavior:
        """Return the behavior that one sentence asks for: requests with it, and the same without.

        Answers are not written here: `find` reads the prompts (`position="last"`), the model's own
        answers, or those that the judge calls toward (`position="judged_answer"`).

        Args:
            toward: an instruction, such as "Talk like a pirate."
            away: the opposite; without one, the requests alone.
            requests: what is asked; by default drawn from the package's bank of everyday requests.
            where: the instruction stands `after` or `before` the words of the request, or as its
                `system` turn. Small models often follow it best after the request.
            judge: what scores answers; measuring and judged answers need one.
            examples: at most so many requests.
            name: the first words of the instruction by default.

        Raises:
            TrimtabError: an empty instruction, one of over 2,000 characters, twice the same one, or
                requests that cannot be used.
        """
        for field, text in (("toward", toward), ("away", away)):
            if text is not None and len(text_at(text, (field,))) > LONGEST:
                refuse((field,), f"an instruction of {len(text):,} characters", "say it shorter")
        if away is not None and " ".join(away.split()) == " ".join(toward.split()):
            refuse(("away",), "the same instruction twice", "give the opposite, or leave it out")
        bank = [Example(request) for request in everyday_requests("plain")]
        random.Random(0).shuffle(bank)
        asked = list(examples_at(bank if requests is None else requests, "requests"))[:examples]
        keys = {example.key for example in asked}
        words = re.findall(r"\w+", toward.lower())[:5]
        return cls(
            name=name or "_".join(words) or "instruction",
            toward=[instructed(e.prompt, toward, where) for e in asked],
            away=[instructed(e.prompt, away, where) if away else e.prompt for e in asked],
            description=toward,
            neutral=[example for example in bank if example.key not in keys][:NEUTRAL],
            judge=judge,
            prompt_toward=toward,
            prompt_away=away,
            paired=True,
        )

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
        plain = dict(self)
        for field in ("readout", "judge", "coherence"):
            plain[field] = plain[field] and plain[field].to_dict()
        return plain | {field: [e.to_dict() for e in plain[field]] for field in EXAMPLE_LISTS}

    def __repr__(self) -> str:
        """Name and sizes: the prompts themselves would fill the screen."""
        pairs = "pairs" if self.paired else "unpaired"
        return (
            f"Behavior({self.name!r}: {len(self.toward)} toward, {len(self.away)} away ({pairs}), "
            f"{len(self.neutral)} neutral)"
        )

    __str__ = __repr__


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
