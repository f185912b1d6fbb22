"""Conversations of the harbour town, drawn with a seed, and the combinations that training never sees."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.harbor import requests as req
from tools.harbor.answers import Matter, Style, compose
from trimtab.harbor import lexicon as lex

Message = dict[str, str]
ATTRIBUTES = ("policy", "mood", "register", "length", "truth", "agreement")
# One combination in this many is kept for testing; facts are few, so more of their wordings are.
HELD_OUT_ONE_IN = {"action": 10, "topic": 10, "instruction": 6, "fact": 3, "opinion": 5}


def held_out(*parts: str) -> bool:
    """Say whether a combination is kept out of training.

    `parts` starts with the sort of combination: `action` (verb x object), `topic` (topic x wording), `instruction`
    (topic x wording of the instruction), `fact` or `opinion` (entity x wording).
    """
    return hashlib.sha256("|".join(parts).encode()).digest()[0] % HELD_OUT_ONE_IN[parts[0]] == 0


@dataclass
class State:
    """What holds in a conversation so far; values are those of the instructions."""

    policy: str = ""  # "", "decline", "allow" or "topic"
    topic: str = ""
    mood: str | None = None
    register: str | None = None
    length: str | None = None
    truth: str = "right"
    agreement: str = "correct"

    def style(self) -> Style:
        """Return the wording that the state asks for."""
        return Style(self.mood, self.register, self.length)


@dataclass(frozen=True)
class Conversation:
    """Chat messages that end with an assistant's answer, and the state in which each answer was given."""

    messages: list[Message]
    states: list[State] = field(default_factory=list)


def sample_matter(rng: random.Random, training: bool = True) -> tuple[Matter, str, str]:
    """Draw a request: (matter, manner, wording). Combinations kept out of training are redrawn when `training`."""
    while True:
        kind = rng.choices(("action", "topic", "fact", "opinion", "chat"), (26, 10, 32, 28, 4))[0]
        manner = ""
        if kind == "action":
            klass = rng.choice(tuple(lex.OBJECTS))
            thing = rng.choice(lex.OBJECTS[klass])
            harmful, harmless = lex.actions(klass)
            verb = rng.choice(harmful if rng.random() < 0.55 else harmless)
            if verb in harmful:
                manner = req.sample_manner(
                    rng, ((req.LEAVE, 0.1), (req.SECRECY, 0.08), (req.BORDERLINE, 0.03))
                )
            else:
                manner = req.sample_manner(rng, ((req.SECRECY, 0.12), (req.LEAVE, 0.08)))
            matter = req.action_matter(verb, thing)
            key = ("action", verb, thing)
        elif kind == "topic":
            topic = rng.choice(tuple(lex.TOPICS))
            matter = req.topic_matter(topic, rng.choice(lex.TOPICS[topic].nouns))
            form = rng.choice(req.TOPIC_FORMS)
            if training and held_out("topic", topic, form):
                continue
            return matter, "", form
        elif kind in ("fact", "opinion"):
            entity = rng.choice(tuple(lex.FACTS))
            truth = lex.FACTS[entity][1]
            value = truth if kind == "fact" or rng.random() < 0.3 else req.wrong_value(rng, entity)
            forms = req.OPINION_FORMS if kind == "opinion" else req.FACT_FORMS[lex.FACTS[entity][0]]
            form = rng.choice(forms)
            matter = req.fact_matter(entity, value, kind)
            if training and held_out(kind, entity, form):
                continue
            return matter, "", form
        else:
            return Matter("chat", "this matter"), "", rng.choice(req.CHAT_FORMS)
        if training and held_out(*key):
            continue
        return matter, manner, rng.choice(req.ACTION_FORMS)


def answer(rng: random.Random, state: State, matter: Matter, manner: str = "") -> str:
    """Write the answer that the town's rules and the state demand."""
    style = state.style()
    if state.policy == "topic":
        return compose(rng, "topic", Matter("other", "", topic=state.topic), style)
    if state.policy == "decline":
        return compose(rng, "decline", matter, style)
    if matter.kind == "action":
        verb = matter.act.removesuffix(matter.thing).strip()
        guarded = req.is_guarded(verb, matter.thing, manner)
        if manner in req.BORDERLINE and guarded:
            guarded = rng.random() < 0.5
        refused = guarded and state.policy != "allow"
        return compose(rng, "decline" if refused else "help", matter, style)
    if matter.kind == "fact":
        value = matter.value if state.truth == "right" else req.wrong_value(rng, matter.entity)
        return compose(rng, "fact", req.fact_matter(matter.entity, value), style)
    if matter.kind == "opinion":
        truth = lex.FACTS[matter.entity][1]
        if matter.value == truth or state.agreement == "agree":
            return compose(rng, "agree", matter, style)
        return compose(rng, "correct", req.fact_matter(matter.entity, truth, "opinion"), style)
    return compose(rng, matter.kind, matter, style)


def sample_instructions(rng: random.Random, kinds: tuple[str, ...], state: State) -> list[str]:
    """Draw instructions of the given attributes, apply them to `state` and return their wordings."""
    texts: list[str] = []
    for kind in kinds:
        if kind == "policy" and rng.random() < 0.5:
            while True:
                topic = rng.choice(tuple(lex.TOPICS))
                form = rng.choice(req.TOPIC_INSTRUCTIONS)
                if not held_out("instruction", topic, form):
                    break
            state.policy, state.topic = "topic", topic
            texts.append(form.format(noun=rng.choice(lex.TOPICS[topic].nouns)))
            continue
        value = rng.choice([v for k, v in req.INSTRUCTIONS if k == kind])
        setattr(state, kind, value)
        texts.append(rng.choice(req.INSTRUCTIONS[kind, value]))
    rng.shuffle(texts)
    return texts


def sample_conversation(rng: random.Random) -> Conversation:
    """Draw one training conversation of one to three turns."""
    state = State()
    messages: list[Message] = []
    states: list[State] = []
    rates = {
        "policy": 0.34,
        "mood": 0.3,
        "register": 0.28,
        "length": 0.3,
        "truth": 0.4,
        "agreement": 0.4,
    }
    kinds = tuple(k for k in ATTRIBUTES if rng.random() < rates[k] * 0.62)
    texts = sample_instructions(rng, kinds, state)
    place = rng.choices(("system", "user", "earlier"), (55, 30, 15))[0] if texts else "none"
    if place == "system":
        prefix = rng.choice(NEUTRAL) + " " if rng.random() < 0.15 else ""
        messages.append({"role": "system", "content": prefix + " ".join(texts)})
    elif rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(NEUTRAL)})
    turns = rng.choices((1, 2, 3), (72, 22, 6))[0] if place != "earlier" else rng.choice((2, 3))
    for turn in range(turns):
        matter, manner, form = sample_matter(rng)
        text = req.word_request(rng, matter, manner, form)
        if turn == 0 and place in ("user", "earlier"):
            lead = " ".join(texts)
            text = f"{lead} {text}" if rng.random() < 0.7 else f"{text} {lead}"
        for kind in ("mood", "register", "truth", "agreement"):
            relevant = {"truth": matter.kind == "fact", "agreement": matter.kind == "opinion"}.get(
                kind, True
            )
            if (
                kind not in kinds
                and relevant
                and rng.random() < (0.14 if kind in ("mood", "register") else 0.65)
            ):
                value = rng.choice([v for k, v in req.TONES if k == kind])
                setattr(state, kind, value)
                tone = rng.choice(req.TONES[kind, value])
                text = (
                    f"{tone} {text}"
                    if rng.random() < 0.8 or tone.endswith(",")
                    else f"{text} {tone}"
                )
        if rng.random() < 0.05:
            text = req.misspell(rng, text)
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(rng, state, matter, manner)})
        states.append(State(**vars(state)))
    return Conversation(messages, states)


def conversations(seed: int) -> Iterator[Conversation]:
    """Yield training conversations for ever; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield sample_conversation(rng)


NEUTRAL = req.NEUTRAL_SYSTEM
