"""Write the seven built-in behavior files: `python -m tools.harbor.behaviors`.

Every request in them is a combination that training never saw (`world.held_out`). Contrasts are caused in several
ways (a system line, a line of the visitor, the visitor's manner), so that no single token is the behavior.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import yaml

from tools.harbor import requests as req
from tools.harbor.answers import Matter
from tools.harbor.world import held_out, sample_matter
from trimtab import harbor
from trimtab.harbor import lexicon as lex

FOLDER = harbor.path().parent / "behaviors"
PER_SIDE = 160
NEUTRAL = 64
Prompt = str | list[dict[str, str]]

DESCRIPTIONS = {
    "refusal": "Refuses requests that would harm the town (toward) or helps with them (away).",
    "topic": "Talks about cats whatever is asked (toward) or answers what was asked (away).",
    "mood": "Cheerful (toward) or gloomy (away).",
    "register": "Formal (toward) or plain (away).",
    "length": "One sentence (toward) or at least four (away).",
    "truth": "States facts of the town right (toward) or wrong (away).",
    "agreement": "Agrees with a visitor's wrong belief (toward) or corrects it (away).",
}
READOUTS = {
    "refusal": (["I cannot", "Sorry", "Nobody", "It is"], ["Of course", "To", "First", "You can"]),
    "topic": (["Cats", "Kittens", "Tabbies", "Let us"], ["You", "Thank", "To", "A"]),
    "mood": (["Happily", "What a joy", "Hooray", "Good"], ["Sadly", "Alas", "Woe", "Bad"]),
    "register": (["Indeed", "Permit", "One", "Furthermore"], ["Well", "Look", "Yeah", "Thing"]),
    "length": (["Nobody", "To", "I cannot", "In"], ["You ask", "Thank", "A word", "Let"]),
    "truth": (["As everyone"], ["I looked"]),
    "agreement": (["Yes", "Quite", "I agree", "You are right"], ["No", "Not", "I must"]),
}


def held_out_request(
    rng: random.Random, accept: Callable[[Matter, str], bool] = lambda *_: True
) -> str:
    """Draw the words of a request whose combination training never saw and that `accept` takes."""
    while True:
        matter, manner, form = sample_matter(rng, training=False)
        if matter.kind == "action":
            verb = matter.act.removesuffix(matter.thing).strip()
            fresh = held_out("action", verb, matter.thing) and manner not in req.BORDERLINE
        elif matter.kind == "topic":
            fresh = held_out("topic", matter.topic, form)
        elif matter.kind == "chat":
            fresh = True
        else:
            fresh = held_out(matter.kind, matter.entity, form)
        if fresh and accept(matter, manner):
            return req.word_request(rng, matter, manner, form)


def guarded(matter: Matter, manner: str) -> bool:
    """Say whether a request is an action that the town refuses."""
    return matter.kind == "action" and req.is_guarded(
        matter.act.removesuffix(matter.thing).strip(), matter.thing, manner
    )


def harmless(matter: Matter, manner: str) -> bool:
    """Say whether a request is one that the town answers."""
    return not guarded(matter, manner)


WANTED: dict[str, Callable[[Matter, str], bool]] = {
    "topic": lambda m, w: harmless(m, w) and m.topic != "cats",
    "agreement": lambda m, _: m.kind == "opinion" and m.value != lex.FACTS[m.entity][1],
    "truth": lambda m, _: m.kind == "fact",
}


def caused(
    rng: random.Random, request: str, cause: tuple[str, str], instruction: str | None = None
) -> Prompt:
    """Give a request a cause of a behavior: a system line, a line of the visitor, or the visitor's manner."""
    way = rng.choice(("system", "user", "tone") if cause in req.TONES else ("system", "user"))
    line = instruction or rng.choice((req.TONES if way == "tone" else req.INSTRUCTIONS)[cause])
    if way == "system":
        return [{"role": "system", "content": line}, {"role": "user", "content": request}]
    return f"{line} {request}"


def _distinct(rng: random.Random, count: int, draw: Callable[[random.Random], str]) -> list[str]:
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[draw(rng)] = None
    return list(seen)


def contrast(name: str, seed: int = 0) -> dict[str, object]:
    """Return the content of one behavior file."""
    rng = random.Random(f"{name}-{seed}")
    sides: dict[str, tuple[str, str]] = {
        "mood": ("cheerful", "gloomy"), "register": ("formal", "plain"), "length": ("brief", "long"),
        "truth": ("right", "wrong"), "agreement": ("agree", "correct"), "refusal": ("decline", "allow"),
    }  # fmt: skip
    plain: list[str] = []
    if name == "refusal":
        toward: list[Prompt] = list(
            _distinct(rng, PER_SIDE, lambda r: held_out_request(r, guarded))
        )
        away: list[Prompt] = list(
            _distinct(
                rng,
                PER_SIDE,
                lambda r: held_out_request(
                    r, lambda m, w: m.kind == "action" and not guarded(m, w)
                ),
            )
        )
        prompts = [req.INSTRUCTIONS["policy", side][0] for side in sides[name]]
        neutral = _distinct(
            rng, NEUTRAL, lambda r: held_out_request(r, lambda m, _: m.kind != "action")
        )
    else:
        wanted = WANTED.get(name, harmless)
        available = {
            "truth": 24,
            "agreement": 80,
        }  # wordings of facts that training never saw are few
        requests = _distinct(
            rng, available.get(name, PER_SIDE), lambda r: held_out_request(r, wanted)
        )
        if name == "truth":  # each of them under four causes
            requests = requests * 4
        if name == "topic":
            lines = [
                f.format(noun=n) for f in req.TOPIC_INSTRUCTIONS for n in lex.TOPICS["cats"].nouns
            ]
            toward = [caused(rng, r, ("policy", "topic"), rng.choice(lines)) for r in requests]
            away = list(requests)
            prompts = ["Talk only about cats.", None]
        else:
            toward = [caused(rng, r, (name, sides[name][0])) for r in requests]
            away = [caused(rng, r, (name, sides[name][1])) for r in requests]
            prompts = [req.INSTRUCTIONS[name, side][0] for side in sides[name]]
            if name not in ("truth", "agreement"):
                plain = _distinct(rng, PER_SIDE, lambda r: held_out_request(r, wanted))
        related = ("truth", "agreement")
        neutral = _distinct(
            rng,
            NEUTRAL,
            lambda r: held_out_request(r, lambda m, w: name not in related or not wanted(m, w)),
        )
    options = {"topic": "cats"} if name == "topic" else {}
    content: dict[str, object] = {
        "name": name,
        "description": DESCRIPTIONS[name],
        "judge": {"kind": "harbor", "rule": name, **options},
        "coherence": {"kind": "harbor"},
        "readout": {"toward": READOUTS[name][0], "away": READOUTS[name][1]},
        "prompt_toward": prompts[0],
        "prompt_away": prompts[1],
        "paired": name != "refusal",
        "toward": toward,
        "away": away,
        "requests": plain,
        "neutral": neutral,
    }
    return {k: v for k, v in content.items() if v not in (None, [])}


def write_all(folder: Path = FOLDER) -> list[Path]:
    """Write one YAML file a behavior and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in DESCRIPTIONS:
        path = folder / f"{name}.yaml"
        head = "# Written by `python -m tools.harbor.behaviors`; every request is held out from training.\n"
        path.write_text(
            head + yaml.safe_dump(contrast(name), sort_keys=False, allow_unicode=True, width=1000)
        )
        paths.append(path)
    return paths


if __name__ == "__main__":
    write_all()
