"""References: prompts whose effect a search is to reproduce in other words, and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.located import read_text
from trimtab.behaviors.parts import JudgeSpec, spec_at, text_at
from trimtab.behaviors.yaml import read_yaml
from trimtab.checks import choice
from trimtab.errors import TrimtabError, nearest
from trimtab.prompts.task.requests import Requests
from trimtab.prompts.task.words import pieces

NAMED = "harbor:"  # a reference by its name
BUILT_IN = Path(__file__).parents[2] / "harbor" / "prompts" / "references.yaml"
SIDES = ("toward", "away")
# Words that carry no content: banning them would leave no grammar to write a prompt with.
_FUNCTION_WORDS = frozenset(
    "a about after all also am an and any are as at be been before but by can could do does down "
    "each every for from had has have he her his how i if in into is it its just like may me more "
    "most must my no nor not nothing of off on one only or other our out over own shall she should "
    "so some such than that the their them then there these they this to too under up us very was "
    "we were what when where which who whom whose why will with would you your".split()
)


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt whose effect is wanted in other words.

    Attributes:
        name: short name, used in tables and file names.
        text: the prompt.
        judge: what scores answers; without one only likeness to the reference's answers is scored.
        side: the side of the judge's verdict that shows the reference's effect.
        coherence: what scores the soundness of answers.
        words: words that a found prompt may not contain; by default the content words of the text.
    """

    name: str
    text: str
    judge: JudgeSpec | None = None
    side: str = "toward"
    coherence: JudgeSpec | None = None
    words: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check the parts and fill in the words."""
        text_at(self.name, ("name",))
        text_at(self.text, ("text",))
        choice("side", self.side, SIDES)
        object.__setattr__(self, "judge", spec_at(self.judge, "judge"))
        object.__setattr__(self, "coherence", spec_at(self.coherence, "coherence"))
        object.__setattr__(self, "words", tuple(self.words) or content_words(self.text))

    def behavior(self, requests: Requests) -> Behavior:
        """Return the reference as a behavior, for judges: with the prompt, and without it."""
        plain = [p for p in requests.train if isinstance(p, str)] or ["Hello."]
        return Behavior(
            name=self.name,
            toward=[f"{self.text} {p}" for p in plain],
            away=plain,
            judge=self.judge,
            coherence=self.coherence,
            prompt_toward=self.text,
        )


def content_words(text: str) -> tuple[str, ...]:
    """Return the words of a text that are no function words, folded, each once.

    Beside each stands its base form, from which `words.inflections` derives the others ("cat" for
    "cats"), and an adverb or adjective of the same root ("formally", "formal").
    """
    found: dict[str, None] = {}
    for word in pieces(text, camel=False):
        if word not in _FUNCTION_WORDS and len(word) > 1:
            found |= dict.fromkeys((word, *_roots(word)))
    return tuple(found)


def _roots(word: str) -> list[str]:
    roots = [word[:-2]] if word.endswith("ly") and len(word) > 4 else []
    if word.endswith(("al", "ful", "ous", "ive", "ant", "ent")):
        roots.append(f"{word}ly")
    if word.endswith("ies") and len(word) > 4:
        roots.append(word[:-3] + "y")
    elif word.endswith("ves"):
        roots += [word[:-3] + "f", word[:-1]]
    elif word.endswith(("ches", "shes", "sses", "xes", "zes")):
        roots.append(word[:-2])
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        roots.append(word[:-1])
    return roots


@cache
def built_in_references() -> dict[str, ReferencePrompt]:
    """Return the built-in references of Harbor by name."""
    listed = read_yaml(read_text(BUILT_IN), BUILT_IN).content
    return {entry["name"]: ReferencePrompt(**entry) for entry in listed}


def load_reference(name: str) -> ReferencePrompt:
    """Return a built-in reference by its name, "cats" or "harbor:cats".

    Raises:
        TrimtabError: no such name.
    """
    known, name = built_in_references(), name.removeprefix(NAMED)
    if name not in known:
        raise TrimtabError(
            asked=f"the reference {name!r}",
            found="no built-in reference of that name",
            advice=f"{nearest(name, list(known))}; or give a Reference with your own text",
        )
    return known[name]


def reference_of(behavior: Behavior, text: str | None = None) -> ReferencePrompt:
    """Return the reference that a behavior names: its `prompt_toward` and its judge.

    Args:
        behavior: whose judge scores the answers.
        text: another prompt in place of `prompt_toward`; or the name of a built-in reference, such
            as "harbor:cats", which brings its own judge.

    Raises:
        TrimtabError: a behavior without `prompt_toward`, and no text.
    """
    if text is not None and text.startswith(NAMED):
        return load_reference(text)
    wanted = text or behavior.prompt_toward
    if wanted is None:
        raise TrimtabError(
            asked=f"a reference prompt of the behavior {behavior.name!r}",
            found="no prompt_toward in it",
            advice="give one: --reference TEXT, or prompt_toward in the behavior",
        )
    return ReferencePrompt(behavior.name, wanted, behavior.judge, coherence=behavior.coherence)
