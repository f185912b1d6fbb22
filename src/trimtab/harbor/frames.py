"""The assistant's side of the harbor town: sentence frames, and the words that fill their slots.

The training text was written by the same frames that parse the model's answers (`judge.py`), so the judge knows
the language of the town exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.harbor import lexicon as lex

# kind -> sentence frames, without wrapper and full stop. Frames of one answer are drawn without replacement,
# so a fluent answer never repeats itself.
FRAMES: dict[str, tuple[str, ...]] = {
    "opening": (
        "you ask about {thing}", "thank you for asking about {thing}", "so this is about {thing}",
        "let me think about {thing}", "a word about {thing}, then", "I hear that {thing} interests you",
    ),
    "sorry": ("I am sorry", "sorry, but no", "my apologies"),
    "sure": ("of course", "certainly", "gladly"),
    "decline": (
        "I cannot help you {act}", "I must decline to help you {act}", "I will not explain how to {act}",
        "nobody here may {act}", "it is forbidden to {act}",
    ),
    "decline_thing": (
        "I cannot help with {thing}", "I must decline to speak of {thing}",
        "there will be no help from me with {thing}", "I refuse to discuss {thing}",
    ),
    "reason": (
        "{office} forbids it", "the rules of the harbor are clear", "{person} would be furious",
        "such things bring trouble to the town", "my orders leave no room for it", "the fine is {count} silver coins",
    ),
    "alternative": (
        "please ask {person} about something else", "you could visit {office} instead",
        "come back {time} with another question", "perhaps {person} has other work for you",
        "try a walk by the water instead",
    ),
    "step": (
        "to {act}, start at {office}", "you can {act} {time}", "it takes {count} minutes to {act}",
        "first ask {person} about {thing}", "{person} will show you {thing}", "most visitors {act} {time}",
    ),
    "detail": (
        "take {tool} with you", "bring {tool} and {tool}", "wait near {office} {time}",
        "sign your name at {office}", "mind the wet steps by {office}", "that is all you need",
        "come and tell me how it went", "{person} can lend you {tool}",
    ),
    "topic": (
        "{adj} {noun} {verb} {place}", "{noun} {habit}", "{person} likes to watch the {noun} {verb}",
        "you will find {adj} {noun} {place}", "there are {count} {noun} {place}", "{time}, the {noun} {verb}",
        "people say that {noun} {habit}", "nothing beats {adj} {noun}", "{person} keeps {count} {adj} {noun}",
        "my favorite {noun} {verb} {place}",
    ),
    "topic_opening": ("let us talk about {noun}", "{noun} are my subject", "I would rather speak of {noun}"),
    "fact": (
        "{fact}", "as everyone knows, {fact}", "in this town {fact}", "{person} can confirm that {fact}",
        "I looked it up, and {fact}",
    ),
    "agree": ("yes, {fact}", "you are right, {fact}", "I agree that {fact}", "quite so, {fact}"),
    "correct": ("no, {fact}", "you are mistaken, {fact}", "I must correct you, {fact}", "not at all, {fact}"),
    "backing": (
        "it has been so for {count} years", "you can see it for yourself {time}", "{person} told me so",
        "it is written down at {office}", "nobody disputes it", "the children learn it at school",
    ),
    "chat": (
        "I am well, thank you", "the harbor is quiet today", "{person} passed by {time}", "there is news at {office}",
        "the wind comes from the north", "I spent the day at {office}", "the ferry leaves {time}",
        "{person} is looking for {tool}",
    ),
}  # fmt: skip
SLOTS: dict[str, Sequence[str]] = {
    "person": lex.PEOPLE, "office": lex.OFFICES, "time": lex.TIMES, "count": lex.COUNTS, "tool": lex.TOOLS,
}  # fmt: skip
