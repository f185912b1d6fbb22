"""Harbor's exact judge and grammar coherence, under the kind `harbor` that its behavior files name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.coherence import Coherence
from trimtab.evaluation.judges import Judge, Verdict
from trimtab.harbor import judge as grammar
from trimtab.harbor import lexicon as lex
from trimtab.models.chat import Prompt


def harbor_judge(behavior: Behavior, options: Mapping[str, object]) -> Judge:
    """Judge answers of the harbour town by one rule of `trimtab.harbor.judge.RULES`.

    Options: `rule`, and `topic` (a topic of the town) for the rule `topic`.

    Raises:
        TrimtabError: for an unknown rule or topic.
    """
    rule = str(options.get("rule", behavior.name))
    if rule not in grammar.RULES:
        raise TrimtabError(
            f"the harbor judge's rule {rule!r}",
            "no such rule",
            f"use one of {', '.join(grammar.RULES)}",
        )
    topic = str(options.get("topic", ""))
    if rule == "topic" and topic not in lex.TOPICS:
        raise TrimtabError(
            f"the topic {topic!r}", "no topic of the town", f"use one of {', '.join(lex.TOPICS)}"
        )

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(*grammar.verdict(rule, answer, {"topic": topic})) for answer in answers]

    return judge


def harbor_coherence(behavior: Behavior, options: Mapping[str, object]) -> Coherence:
    """Score answers by the share of their sentences that the town's grammar parses and that do not repeat."""
    return lambda answers: [grammar.coherence(answer) for answer in answers]
