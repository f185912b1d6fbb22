"""The judge `language`: which language an answer is in, by langid's naive Bayes over bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, extra
from trimtab.evaluation.judges import NEITHER, Judge, Options, Verdict

if TYPE_CHECKING:
    from trimtab.behaviors.behavior import Behavior

# Fewer letters than this tell no language.
LETTERS = 12
# What an answer may be in unless `among` says so; small neighbors of a language (Aragonese,
# Extremaduran, Venetian) would otherwise take every faulty sentence of it.
AMONG = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja",
    "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "sw", "ta", "th", "tr", "uk", "ur", "vi", "zh",
)  # fmt: skip


def language(behavior: Behavior, options: Options) -> Judge:
    """Judge by the language that langid finds: toward for `toward`, away for `away`, both as codes.

    Without `away` every other language is away. `among` lists the codes to choose from, 33 widely
    written languages by default. Answers of fewer than 12 letters are neither. It hears the
    language, not whether what is said is sound.

    Source: Lui and Baldwin, 2012, as packaged in py3langid.
    """
    langid = extra("py3langid.langid", "judges")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    toward, away = options.get("toward"), options.get("away")
    among: Any = options.get("among", AMONG)
    try:
        if set(options) - {"toward", "away", "among"} or toward is None or toward == away:
            raise ValueError
        identifier.set_languages({toward, *among} | ({away} if away is not None else set()))
    except (ValueError, TypeError):
        raise TrimtabError(
            f"the judge 'language' of the behavior {behavior.name!r}",
            f"the options {dict(options)}",
            f"give toward:, and away: if you like, as codes: {', '.join(identifier.labels)}",
        ) from None

    def verdict(answer: str) -> Verdict:
        if sum(map(str.isalpha, answer)) < LETTERS:
            return NEITHER
        found = identifier.classify(answer)[0]
        return Verdict(float(found == toward), float(found != toward and away in (None, found)))

    return lambda prompts, answers: [verdict(answer) for answer in answers]
