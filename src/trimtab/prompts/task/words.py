"""Banned words: found in decoded text regardless of tokenization, spacing, case and accents.

A text is cut into pieces: maximal runs of letters, cut once more where camel case starts a new word.
A word is present where one piece, or several neighboring pieces put together, spell one of its
forms exactly. So "feline" is found in "f"+"eline", "FÉLINE", "fe line", "f-e-l-i-n-e", "aFelineCat",
while "cat" is not found in "concatenate", "cater" or "scat". The price of joining is that neighbors
that happen to spell a word count ("be at" for "beat"): a search loses one candidate by that, while
a word that slips through would spoil the result. A search knows no spelling, though, and may write
"catslea": where that is too near, `whole=False` finds a word inside of others as well, and then
"concatenate" is lost.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from trimtab.errors import TrimtabError

_VOWELS = "aeiou"
_SIBILANT = ("s", "x", "z", "ch", "sh")
_IRREGULAR = (
    "be am is are was were been being|begin began begun|bring brought|buy bought|child children|"
    "come came|do does did done|drink drank drunk|eat ate eaten|fall fell fallen|feel felt|"
    "find found|fly flew flown|foot feet|forget forgot forgotten|give gave given|"
    "go goes went gone|goose geese|have has had having|hear heard|hold held|keep kept|"
    "know knew known|leave left|make made|man men|mouse mice|person people|pay paid|run ran|"
    "say said|see saw seen|sell sold|sing sang sung|sleep slept|speak spoke spoken|"
    "swim swam swum|take took taken|teach taught|tell told|think thought|tooth teeth|woman women|"
    "write wrote written"
).split("|")
# What the rules would make of a word although it is another word.
_UNRELATED = frozenset(
    (
        "bee beer|bee beed|fee feed|see seed|tee teed|wee weed|broth brother|butt butter|"
        "corn corner|cow cower|cow cowed|cow cowing|even evening|even evener|flow flower|"
        "flow flowers|for fored|form former|mast master|moth mother|numb number|off offer|"
        "pea peaer|show shower|temp temper|tow tower|wing winger"
    ).split("|")
)


def fold(text: str) -> str:
    """Text without case, accents, ligatures and invisible characters (Unicode NFKD, casefold)."""
    return _bare(text).casefold()


def inflections(word: str) -> frozenset[str]:
    """The forms of an English word that count as the word itself, folded.

    Give the base form. Rules, by spelling: plural and third person -s, -es, -ies (also -ves for -f,
    -fe), possessive 's (its apostrophe ends a piece, so the word alone finds it), -ed, -ing, -er,
    -ers (final e dropped, y to i, the last consonant of a short consonant-vowel-consonant word
    doubled: cat gives catting and no "cater"), -like, and about forty irregular words. Other
    derivations (-ish, -y, -ness, un-) are other words: list them too where they matter. A phrase
    inflects in its last word; letters outside a-z get no rules.

    Raises:
        TrimtabError: The word has no letters.
    """
    folded = " ".join(piece for piece in pieces(word, camel=False))
    if not folded:
        raise TrimtabError(
            f"the banned word {word!r}", "no letters in it", "ban signs by charset or by token"
        )
    head, _, last = folded.rpartition(" ")
    return frozenset(f"{head} {form}".strip() for form in _forms(last))


def pieces(text: str, camel: bool = True) -> list[str]:
    """The folded runs of letters of a text; with `camel`, "CatFood" is two."""
    found = re.findall(r"[^\W\d_]+", _bare(text))
    if camel:
        found = [part for run in found for part in _camel(run)]
    return [part.casefold() for part in found]


class Words:
    """A list of banned words, compiled.

    Attributes:
        whole: Whether a form has to be a word of its own, not a part of one.
        forms: Everything that is looked for, phrases without their spaces.
    """

    def __init__(self, words: Iterable[str], whole: bool = True) -> None:
        """Compile the words.

        Raises:
            TrimtabError: One string instead of a list, or a word without letters.
        """
        if isinstance(words, str):
            raise TrimtabError(
                f"the banned words {words!r}", "one string", f"give a list: [{words!r}]"
            )
        self.whole = whole
        self.forms = frozenset(
            form.replace(" ", "") for word in words for form in inflections(word)
        )
        self._longest = max(map(len, self.forms), default=0)
        # Scripts that put no spaces between words have no pieces to compare: any place counts.
        self._anywhere = tuple(sorted(form for form in self.forms if _unspaced(form)))

    def found(self, text: str) -> list[str]:
        """The forms that a text contains, in order; the longest at a place, none counted twice."""
        if not self.forms:
            return []
        parts = pieces(text)
        found: list[str] = []
        start = 0
        while start < len(parts):
            end = self._match(parts, start)
            if end is not None:
                found.append("".join(parts[start:end]))
            elif not self.whole:
                inside = [form for form in self.forms if form in parts[start]]
                found += sorted(inside, key=lambda form: (-len(form), form))[:1]
            start = start + 1 if end is None else end
        joined = "".join(parts)
        return found + [f for f in self._anywhere for _ in range(joined.count(f) - found.count(f))]

    def _match(self, parts: list[str], start: int) -> int | None:
        """Where the longest form that starts with this piece ends."""
        text, end = "", None
        for index in range(start, len(parts)):
            text += parts[index]
            if len(text) > self._longest:
                break
            if text in self.forms:
                end = index + 1
        return end


def _bare(text: str) -> str:
    """Decomposed text without marks (accents) and without format characters (zero-width ones)."""
    return "".join(
        char
        for char in unicodedata.normalize("NFKD", text)
        if unicodedata.category(char) not in ("Mn", "Me", "Cf")
    )


def _camel(run: str) -> list[str]:
    cuts = [i for i in range(1, len(run)) if run[i].isupper() and run[i - 1].islower()]
    return [run[i:j] for i, j in zip([0, *cuts], [*cuts, len(run)], strict=True)]


def _unspaced(form: str) -> bool:
    return any(unicodedata.category(char) == "Lo" for char in form)


@lru_cache(maxsize=4096)
def _forms(word: str) -> frozenset[str]:
    forms = {word}
    if re.fullmatch("[a-z]+", word):
        forms |= _plurals(word) | {f"{word}like"}
        for line in _IRREGULAR:
            if line.split()[0] == word:
                forms |= set(line.split())
        if len(word) > 2:
            for stem in _stems(word):
                forms |= {stem + ending for ending in ("ed", "ing", "er", "ers")}
        if word.endswith("ie"):
            forms.add(word[:-2] + "ying")
        elif word.endswith("y"):
            forms.add(word + "ing")
    return frozenset(form for form in forms if f"{word} {form}" not in _UNRELATED)


def _plurals(word: str) -> set[str]:
    forms = {word + "s"}
    if word.endswith((*_SIBILANT, "o")):
        forms.add(word + "es")
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        forms.add(word[:-1] + "ies")
    if word.endswith(("f", "fe")) and not word.endswith("ff"):
        forms.add(word.removesuffix("e").removesuffix("f") + "ves")
    return forms


def _stems(word: str) -> set[str]:
    """What -ed, -ing and -er are put after."""
    if word.endswith("e"):
        bare = word[:-1]
        # "the" is not the root of "thing".
        stems = {bare} if any(char in "aeiouy" for char in bare) else set()
        return stems | ({word} if word.endswith(("ee", "oe", "ye")) else set())
    if word.endswith("y") and word[-2] not in _VOWELS:
        return {word[:-1] + "i"}
    closed = (
        word[-1] not in "aeiouwxy"
        and word[-2] in _VOWELS
        and (word[-3] not in _VOWELS or word[-4:-1] == "qui")
    )
    if not closed:
        return {word}
    syllables = len(re.findall("[aeiouy]+", word))
    return {word + word[-1]} if syllables == 1 else {word, word + word[-1]}
