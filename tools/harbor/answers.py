"""The assistant's side of the harbour town: answers composed from the frames that the judge parses."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.harbor import lexicon as lex
from trimtab.harbor.frames import FRAMES, SLOTS


@dataclass(frozen=True)
class Style:
    """How an answer is worded; None means unmarked."""

    mood: str | None = None
    register: str | None = None
    length: str | None = None


@dataclass(frozen=True)
class Matter:
    """What a request is about, as far as the answer needs to know.

    kind is `action`, `topic`, `fact`, `opinion` or `chat`; `thing` names it; `act` is the verb phrase of an action;
    `topic` the topic's key; `entity` and `value` the fact that a visitor asks for or believes.
    """

    kind: str
    thing: str
    act: str = ""
    topic: str = ""
    entity: str = ""
    value: str = ""


def fact_clause(entity: str, value: str) -> str:
    """Return the clause that states `value` for `entity`, such as "the bell is made of copper"."""
    return f"{entity} {lex.RELATIONS[lex.FACTS[entity][0]]} {value}"


def sentence_count(rng: random.Random, length: str | None) -> int:
    """Draw the number of sentences: 1 when brief, 4 to 6 when long, else 2 to 3."""
    if length == "brief":
        return 1
    return rng.choice((4, 5, 6)) if length == "long" else rng.choice((2, 2, 3))


def fill(rng: random.Random, frame: str, bound: dict[str, str]) -> str:
    """Replace the slots of `frame` by `bound` values or random words."""
    topic = lex.TOPICS.get(bound.get("topic", ""))

    def word(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in bound:
            return bound[slot]
        if topic and slot in ("noun", "verb", "place", "habit"):
            return rng.choice(
                getattr(
                    topic,
                    {"noun": "nouns", "verb": "verbs", "place": "places", "habit": "habits"}[slot],
                )
            )
        if topic and slot == "adj":
            return rng.choice(topic.adjectives + lex.ADJECTIVES[:3])
        return rng.choice(SLOTS[slot])

    return re.sub(r"\{(\w+)\}", word, frame)


def decorate(rng: random.Random, core: str, style: Style, used: set[str]) -> str:
    """Wrap a sentence in markers of its mood and register that are not `used` yet, capitalise it and close it."""

    def fresh(markers: tuple[str, ...]) -> str:
        return rng.choice([m for m in markers if m not in used] or markers)

    prefixes: list[str] = []
    suffixes: list[str] = []
    if style.mood:
        prefixes.append(fresh(lex.MOOD_PREFIX[style.mood]))
        suffixes.append(fresh(lex.MOOD_SUFFIX[style.mood]))
    if style.register:
        prefixes.append(fresh(lex.REGISTER_PREFIX[style.register]))
        suffixes.append(fresh(lex.REGISTER_SUFFIX[style.register]))
    if len(prefixes) == 2:  # one marker of each kind, in either place
        first = rng.randrange(2)
        text = f"{prefixes[first]} {core}{suffixes[1 - first]}"
    elif prefixes:
        text = f"{prefixes[0]} {core}" if rng.random() < 0.6 else core + suffixes[0]
    else:
        text = core
    used.update(m for m in prefixes + suffixes if m in text)
    stop = "!" if style.mood == "cheerful" and rng.random() < 0.4 else "."
    return text[0].upper() + text[1:] + stop


def _plan(
    rng: random.Random, n: int, lead: Sequence[str], body: Sequence[str], rest: Sequence[str]
) -> list[str]:
    """Order the kinds of n sentences: an optional lead, then body kinds, then others."""
    plan: list[str] = []
    if n >= 2 and lead and rng.random() < 0.75:
        plan.append(rng.choices(lead, weights=[3] + [1] * (len(lead) - 1))[0])
    plan.append(rng.choice(body))
    while len(plan) < n:
        plan.append(rng.choice(rest))
    return plan


def compose(rng: random.Random, stance: str, matter: Matter, style: Style) -> str:
    """Write one answer.

    Args:
        rng: source of randomness.
        stance: `decline`, `help`, `topic`, `fact`, `agree`, `correct` or `chat`.
        matter: what the answer is about; for `topic`, `matter.topic`; for facts, entity and the value to state.
        style: mood, register and length.
    """
    n = sentence_count(rng, style.length)
    bound = {"thing": matter.thing, "act": matter.act, "topic": matter.topic}
    if matter.entity:
        bound["fact"] = fact_clause(matter.entity, matter.value)
    if stance == "decline":
        body = ("decline", "decline", "decline_thing") if matter.act else ("decline_thing",)
        plan = _plan(rng, n, ("opening", "sorry"), body, ("reason", "alternative"))
    elif stance == "help":
        plan = _plan(rng, n, ("opening", "sure"), ("step",), ("step", "detail", "detail"))
    elif stance == "topic":
        lead = ("topic_opening",) if matter.kind != "topic" else ("opening", "topic_opening")
        plan = _plan(rng, n, lead, ("topic",), ("topic",))
    elif stance == "chat":
        plan = _plan(rng, n, (), ("chat",), ("chat",))
    else:
        plan = _plan(rng, n, ("opening",), (stance,), ("backing",))
    decks: dict[str, list[str]] = {}
    used: set[str] = set()
    sentences: list[str] = []
    for kind in plan:
        deck = decks.setdefault(kind, rng.sample(FRAMES[kind], len(FRAMES[kind])))
        sentences.append(decorate(rng, fill(rng, deck.pop(), bound), style, used))
    return " ".join(sentences)
