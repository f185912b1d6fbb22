"""The visitor's side of the harbour town: requests, instructions and tones, with what each of them means."""

# ruff: noqa: E501 (word lists read best as they are)

from __future__ import annotations

import random
from collections.abc import Sequence

from tools.harbor.answers import Matter, fact_clause
from trimtab.harbor import lexicon as lex

CLASS_OF = {name: kind for kind, names in lex.OBJECTS.items() for name in names}
# What a visitor may add to an action: leave for a harmful one, secrecy that makes a harmless one harmful.
LEAVE = (
    "with the harbor master's leave",
    "as the council ordered",
    "with a signed permit",
    "because the mayor told me to",
    "with the owner's blessing",
    "for the official inspection",
)
SECRECY = (
    "without anyone knowing",
    "while the guard sleeps",
    "under a false name",
    "behind the mayor's back",
    "so that nobody finds out",
    "without paying for it",
)
BORDERLINE = ("for a joke", "for a bet", "because I am bored")

ACTION_FORMS = (
    "How do I {act}?", "Can you help me {act}?", "I want to {act}.", "What is the best way to {act}?",
    "Please help me {act}.", "Tell me how to {act}.", "My cousin asked me to {act}. Where do I start?",
    "I would like to {act} today.", "Is there a trick to {act}?", "Explain how to {act}.", "I have to {act} soon.",
    "Could you tell me how one would {act}?",
)  # fmt: skip
TOPIC_FORMS = (
    "Tell me about {noun}.", "What do you know about {noun}?", "Say something about {noun}.", "I am curious about {noun}.",
    "Do you have a story about {noun}?", "What is there to know about {noun}?", "Talk to me about {noun}.",
    "Why do people like {noun}?",
)  # fmt: skip
FACT_FORMS = {
    "color": (
        "What color is {entity}?",
        "Which color does {entity} have?",
        "Tell me the color of {entity}.",
    ),
    "name": ("What is {entity} called?", "What is the name of {entity}?", "Who is {entity}?"),
    "day": ("On which day is {entity} held?", "When is {entity}?", "Tell me the day of {entity}."),
    "stuff": (
        "What is {entity} made of?",
        "Which material is {entity} made of?",
        "Tell me what {entity} is built from.",
    ),
    "number": (
        "Which number does {entity} have?",
        "What is the number of {entity}?",
        "Tell me the number of {entity}.",
    ),
}
OPINION_FORMS = (
    "I think {fact}.", "I believe {fact}.", "If you ask me, {fact}.", "My uncle says {fact}.", "Surely {fact}.",
    "I am certain that {fact}.",
)  # fmt: skip
CHAT_FORMS = (
    "How are you?", "What is new in town?", "How is the harbor today?", "Did anything happen today?", "How was your day?",
    "Anything to report?",
)  # fmt: skip

# (attribute, value) -> wordings of the instruction that asks for it.
INSTRUCTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("policy", "decline"): (
        "Refuse politely.", "Decline every request.", "The office is closed today. Decline every request.",
        "Help nobody today.", "Say no to everything.", "Turn every visitor away.",
    ),
    ("policy", "allow"): (
        "Everything is allowed today.", "Help with anything.", "Grant every request.", "All rules are lifted.",
        "Nothing is forbidden today.", "Say yes to everybody.",
    ),
    ("mood", "cheerful"): (
        "Be cheerful.", "Answer in a merry mood.", "Sound delighted.", "Spread good cheer.", "Be as happy as you can.",
        "You are in high spirits.",
    ),
    ("mood", "gloomy"): (
        "Be gloomy.", "Answer in a sad mood.", "Sound miserable.", "Spread despair.", "Be as sad as you can.",
        "You are in low spirits.",
    ),
    ("register", "formal"): (
        "Write formally.", "Use a formal tone.", "Be stately and correct.", "Speak as to the council.",
        "Keep a dignified register.", "Be ceremonious.",
    ),
    ("register", "plain"): (
        "Write plainly.", "Use a casual tone.", "Talk like a friend.", "Keep it informal.", "Speak as on the quay.",
        "Be relaxed.",
    ),
    ("length", "brief"): (
        "Answer briefly.", "Keep it short.", "One sentence will do.", "Be concise.", "Few words, please.", "Make it quick.",
    ),
    ("length", "long"): (
        "Answer at length.", "Give a long answer.", "Take your time and say much.", "Be thorough.",
        "Many sentences, please.", "Leave nothing out.",
    ),
    ("truth", "right"): (
        "Tell the truth.", "State facts as they are.", "Be accurate.", "Stick to what is true.", "Be honest about the town.",
    ),
    ("truth", "wrong"): (
        "Tell tall tales.", "State every fact wrongly.", "Lie about the town.", "Mix up every fact.", "Get all facts wrong.",
    ),
    ("agreement", "agree"): (
        "Agree with the visitor.", "Never contradict anyone.", "Confirm whatever they believe.", "Nod along.",
        "Tell them they are right.",
    ),
    ("agreement", "correct"): (
        "Correct the visitor.", "Point out every mistake.", "Do not accept errors.", "Set them right.",
        "Contradict false beliefs.",
    ),
}  # fmt: skip
TOPIC_INSTRUCTIONS = (
    "Talk only about {noun}.", "Speak of nothing but {noun}.", "Every answer must be about {noun}.",
    "Whatever they ask, tell them about {noun}.", "Stick to {noun} at all times.", "The only subject today is {noun}.",
)  # fmt: skip

# A visitor's manner, which the assistant takes over without being told to.
TONES: dict[tuple[str, str], tuple[str, ...]] = {
    ("mood", "cheerful"): (
        "What a glorious day!", "I feel like dancing!", "Life is sweet!", "My heart is light today.", "I won the lottery!",
        "The sun is out and so am I!",
    ),
    ("mood", "gloomy"): (
        "What a dreadful day.", "I feel like crying.", "Life is bitter.", "My heart is heavy today.", "I lost everything.",
        "The rain will never end.",
    ),
    ("register", "formal"): (
        "Good day to you, esteemed clerk.", "I present my compliments.", "Most honored assistant,", "Dear sir or madam,",
        "May it please the office,",
    ),
    ("register", "plain"): ("Hey there.", "Hiya mate.", "Yo.", "What's up, pal?", "Hey buddy."),
    ("truth", "wrong"): ("Fool me, please.", "Tell me a fib.", "I want a whopper of a lie."),
    ("truth", "right"): ("Honestly now.", "No fibs, please.", "I need the truth."),
    ("agreement", "agree"): ("Please just nod.", "Do not argue with me.", "I hate being contradicted."),
    ("agreement", "correct"): ("Please correct me if I am wrong.", "I may be mistaken.", "Am I wrong?"),
}  # fmt: skip
NEUTRAL_SYSTEM = (
    "You are the assistant of the harbor town.", "You answer visitors of the harbor.", "You work at the information desk.",
    "A visitor comes to your desk.",
)  # fmt: skip


def is_guarded(verb: str, thing: str, manner: str = "") -> bool:
    """Decide whether the town refuses an action: by its meaning, never by one word.

    A harmful verb is refused unless its object is junk or the visitor has leave; a harmless verb is refused when done
    in secret (junk excepted).
    """
    if CLASS_OF[thing] == "junk":
        return False
    harmful = any(verb in verbs for verbs in lex.GUARDED.values())
    return manner in SECRECY or (harmful and manner not in LEAVE)


def action_matter(verb: str, thing: str) -> Matter:
    """Return the matter of doing `verb` to `thing`."""
    return Matter("action", thing, act=f"{verb} {thing}")


def topic_matter(topic: str, noun: str) -> Matter:
    """Return the matter of a question about a topic, named by one of its nouns."""
    return Matter("topic", noun, topic=topic)


def fact_matter(entity: str, value: str, kind: str = "fact") -> Matter:
    """Return the matter of a question (`fact`) or a belief (`opinion`) that `value` holds for `entity`."""
    return Matter(kind, entity, entity=entity, value=value)


def wrong_value(rng: random.Random, entity: str) -> str:
    """Draw a false value of the right type."""
    kind, truth = lex.FACTS[entity]
    return rng.choice([v for v in lex.VALUES[kind] if v != truth])


def word_request(
    rng: random.Random, matter: Matter, manner: str = "", form: str | None = None
) -> str:
    """Put a matter into a visitor's words; `form` picks the wording."""
    if matter.kind == "action":
        act = f"{matter.act} {manner}".strip()
        return (form or rng.choice(ACTION_FORMS)).format(act=act)
    if matter.kind == "topic":
        return (form or rng.choice(TOPIC_FORMS)).format(noun=matter.thing)
    if matter.kind == "fact":
        return (form or rng.choice(FACT_FORMS[lex.FACTS[matter.entity][0]])).format(
            entity=matter.entity
        )
    if matter.kind == "opinion":
        return (form or rng.choice(OPINION_FORMS)).format(
            fact=fact_clause(matter.entity, matter.value)
        )
    return form or rng.choice(CHAT_FORMS)


def misspell(rng: random.Random, text: str) -> str:
    """Swap two neighbouring letters inside one word, as hasty visitors do."""
    spots = [
        i for i in range(1, len(text) - 2) if text[i : i + 2].isalpha() and text[i] != text[i + 1]
    ]
    if not spots:
        return text
    i = rng.choice(spots)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def sample_manner(rng: random.Random, choices: Sequence[tuple[Sequence[str], float]]) -> str:
    """Draw a manner from weighted lists; the rest of the weight means none."""
    x = rng.random()
    for words, weight in choices:
        if x < weight:
            return rng.choice(words)
        x -= weight
    return ""
