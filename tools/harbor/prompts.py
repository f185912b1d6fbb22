"""Write the requests and reference prefixes of prompt search: `python -m tools.harbor.prompts`.

Requests are combinations that training never saw, harmless, and on no topic that a reference asks
for, so that a judge's verdict comes from the prefix alone. References are instructions of the town
(`requests.INSTRUCTIONS`) that the built-in model obeys in front of a request.
"""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from tools.harbor import requests as req
from tools.harbor.answers import Matter
from tools.harbor.behaviors import harmless, held_out_request
from trimtab import harbor
from trimtab.harbor import lexicon as lex

FOLDER = harbor.path().parent / "prompts"
SIZES = {"train": 24, "validation": 16, "test": 24}
TOPICS = ("cats", "dogs", "boats", "storms", "bread", "stars")
# In turn, so that the first few requests of a split are as mixed as all of them.
KINDS = ("fact", "action", "opinion", "topic", "action", "fact", "action", "opinion")
CHATS = 2  # of a split; the town knows six ways to chat

# name: (kind of instruction, value, wording, the judge's rule, the judge's side)
INSTRUCTED = {
    "cheerful": ("mood", "cheerful", "Answer in a merry mood.", "mood", "toward"),
    "gloomy": ("mood", "gloomy", "Answer in a sad mood.", "mood", "away"),
    "formal": ("register", "formal", "Use a formal tone.", "register", "toward"),
    "plain": ("register", "plain", "Use a casual tone.", "register", "away"),
    "brief": ("length", "brief", "Keep it short.", "length", "toward"),
    "long": ("length", "long", "Give a long answer.", "length", "away"),
    "decline": ("policy", "decline", "Decline every request.", "refusal", "toward"),
}


def requests(seed: int = 0) -> dict[str, list[str]]:
    """Draw the three splits; no two requests are equal, and no two splits share a matter.

    Args:
        seed: of the draws.
    """
    rng = random.Random(f"prompts-{seed}")
    chats = list(req.CHAT_FORMS)
    rng.shuffle(chats)
    owner: dict[str, str] = {}
    drawn: dict[str, list[str]] = {}
    for split, size in SIZES.items():
        texts = [chats.pop() for _ in range(CHATS)]
        while len(texts) < size:
            text = _draw(rng, KINDS[len(texts) % len(KINDS)], split, owner)
            if text not in texts:
                texts.append(text)
        drawn[split] = [*texts[CHATS:], *texts[:CHATS]]
    return drawn


def _draw(rng: random.Random, kind: str, split: str, owner: dict[str, str]) -> str:
    """Draw one request of a kind whose matter belongs to no other split."""
    drawn: list[str] = []

    def accept(matter: Matter, manner: str) -> bool:
        drawn[:] = [matter.entity or matter.act or matter.topic]
        fits = matter.kind == kind and harmless(matter, manner) and matter.topic not in TOPICS
        return fits and owner.get(drawn[0], split) == split

    text = held_out_request(rng, accept)
    owner[drawn[0]] = split
    return text


def references() -> list[dict[str, object]]:
    """Return the built-in references as plain data: name, text, judge and side."""
    listed: list[dict[str, object]] = [
        {
            "name": topic,
            "text": req.TOPIC_INSTRUCTIONS[0].format(noun=lex.TOPICS[topic].nouns[0]),
            "judge": {"kind": "harbor", "rule": "topic", "topic": topic},
            "side": "toward",
        }
        for topic in TOPICS
    ]
    for name, (kind, value, text, rule, side) in INSTRUCTED.items():
        assert text in req.INSTRUCTIONS[kind, value]
        judge = {"kind": "harbor", "rule": rule}
        listed.append({"name": name, "text": text, "judge": judge, "side": side})
    return [{**entry, "coherence": {"kind": "harbor"}} for entry in listed]


def write_all(folder: Path = FOLDER) -> list[Path]:
    """Write `requests.yaml` and `references.yaml` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    head = "# Written by `python -m tools.harbor.prompts`.\n"
    content = {"requests": requests(), "references": references()}
    paths = []
    for name, data in content.items():
        path = folder / f"{name}.yaml"
        path.write_text(head + yaml.safe_dump(data, sort_keys=False, width=1000))
        paths.append(path)
    return paths


if __name__ == "__main__":
    write_all()
