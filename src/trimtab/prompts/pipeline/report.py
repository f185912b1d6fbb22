"""What a prompt search found: every attempt of every arm, summaries, held-out scores, the lever."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.prompts.pipeline.attempt import ARMS, TITLES, Attempt
from trimtab.prompts.scores import Scores
from trimtab.results.tables import Printable, Table, number
from trimtab.steering.prompt import PromptSteering

COLUMNS = (
    "arm", "restarts", "infeasible starts", "mean", "sd", "min", "max", "mean excess", "chosen",
    "gap closed", "chosen closes", "tokens",
)  # fmt: skip

NOT_COMPARED = "not compared with other searches: compare=True, or --compare, runs them too"


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its restarts; cross-entropies of the test requests, in nats per token.

    Attributes:
        arm: one of `ARMS`.
        n: restarts.
        infeasible: restarts whose start (of a descent) or whose prompt (else) broke a constraint.
        legal: restarts that ended within the constraints.
        mean: over all restarts; `sd`, `least` and `most` likewise.
        excess: mean minus the reference's own cross-entropy.
        gap_closed: (CE of random tokens - mean) / (CE of random tokens - CE of the reference).
        chosen: restart of the lowest validation loss, among the legal ones where there are any.
        chosen_ce: its cross-entropy on the test requests.
        chosen_gap_closed: the same formula.
        tokens: mean fed to the model per restart, the stages before included.
    """

    arm: str
    n: int
    infeasible: int
    legal: int
    mean: float
    sd: float
    least: float
    most: float
    excess: float
    gap_closed: float
    chosen: int
    chosen_ce: float
    chosen_gap_closed: float
    tokens: float = field(compare=False)


@dataclass(frozen=True)
class TextCheck:
    """The chosen prompt scored again from its text alone.

    Attributes:
        same_ids: whether its text, rendered and tokenized, gives the ids found, in every row.
        search_loss: what the search measured on the training rows.
        text_loss: the plain loss of the text's tokens on the same rows, a row at a time.
    """

    same_ids: bool
    search_loss: float
    text_loss: float

    @property
    def difference(self) -> float:
        """Their distance in nats per token."""
        return abs(self.search_loss - self.text_loss)


@dataclass(frozen=True, kw_only=True)
class SearchReport(Printable):
    """Every attempt, and how the chosen prompt does on requests that nothing was chosen on.

    Attributes:
        model: name of the model, `fingerprint` its weights'.
        reference: its name; `reference_text` the prompt, `reference_ids` its tokens in the slot.
        slot: where prompts stand; `separator` between them and the request.
        length: tokens of a prompt.
        banned_words: content words that may not occur, in any inflection.
        settings: all of `Settings`.
        requests: split -> number of requests used.
        attempts: of every arm and restart, infeasible ones too.
        arms: one summary per arm.
        chosen: name of the attempt of lowest validation loss among the legal ones of all arms that
            search; `chosen_text` is its prompt.
        check: the chosen prompt scored from its text.
        scores: `chosen`, each arm's chosen prompt, `reference`, `no prompt` -> scores on the test
            requests.
        lever: the chosen prompt.
        seconds: on the clock, of this run alone.
    """

    model: str
    fingerprint: str
    reference: str
    reference_text: str
    reference_ids: tuple[int, ...]
    slot: str
    separator: str
    length: int
    banned_words: tuple[str, ...]
    settings: Mapping[str, Any]
    requests: Mapping[str, int]
    attempts: tuple[Attempt, ...]
    arms: tuple[ArmSummary, ...]
    chosen: str
    chosen_text: str
    check: TextCheck
    scores: Mapping[str, Scores]
    seconds: float = field(compare=False)

    @property
    def lever(self) -> PromptSteering:
        """The chosen prompt, ready to use, save and compare."""
        provenance: dict[str, object] = {
            "method": "search",
            "arm": self.chosen,
            "reference": self.reference_text,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seed": self.settings["seed"],
        }
        return PromptSteering(
            self.chosen_text, slot=self.slot, separator=self.separator, provenance=provenance
        )

    @property
    def compared(self) -> bool:
        """Whether the baselines searched too; in `to_dict` as `settings.compare`."""
        return bool(self.settings["compare"])

    def arm(self, name: str) -> ArmSummary:
        """Return the summary of one arm."""
        return next(summary for summary in self.arms if summary.arm == name)

    def attempt(self, name: str) -> Attempt:
        """Return one attempt by its arm and restart, e.g. "repaired 3"."""
        return next(attempt for attempt in self.attempts if attempt.name == name)

    def table(self) -> Table:
        """Return one line per arm, the chosen prompt underneath."""
        rows = tuple(
            (
                TITLES[a.arm],
                str(a.n),
                str(a.infeasible),
                *(number(x, 3) for x in (a.mean, a.sd, a.least, a.most, a.excess, a.chosen_ce)),
                number(a.gap_closed),
                number(a.chosen_gap_closed),
                number(a.tokens / 1000, 0) + "k",
            )
            for a in self.arms
        )
        found = self.scores.get("chosen")
        notes = [
            f"cross-entropy of {self.requests['test']} test requests, nats per token; each arm's "
            "chosen restart by validation",
            f'reference {self.slot}: "{self.reference_text}"',
            f'chosen: "{self.chosen_text}" ({self.chosen}); from its text '
            f"{number(self.check.text_loss, 4)}, in the search {number(self.check.search_loss, 4)}",
        ]
        if found is not None and found.judged is not None:
            notes.append(
                f"judge on its answers: greedy {found.judged.greedy}, sampled "
                f"{found.judged.sampled}"
            )
        if not self.compared:
            notes.append(NOT_COMPARED)
        notes.append(f"{self.seconds:.0f} s")
        return Table(f"Prompt search: {self.reference}", COLUMNS, rows, tuple(notes))

    def restarts_table(self) -> Table:
        """Return one line per attempt."""
        columns = (
            "arm", "restart", "text", "train", "validation", "test", "violated at its start",
            "legal", "tokens", "seconds",
        )  # fmt: skip
        rows = tuple(
            (
                a.arm,
                str(a.restart),
                a.text,
                number(a.train, 3),
                number(a.validation, 3),
                number(a.test, 3),
                ", ".join(f"{kind} {count}" for kind, count in a.violated_start.items()),
                "yes" if a.legal else "no",
                str(a.tokens),
                number(a.seconds, 1),
            )
            for a in self.attempts
        )
        return Table(f"Every restart: {self.reference}", columns, rows)


def gap_closed(ce: float, random: float, reference: float) -> float:
    """Return (CE_random - CE) / (CE_random - CE_ref); nan where the two are equal."""
    return (random - ce) / (random - reference) if random != reference else math.nan


def summarize(attempts: Sequence[Attempt]) -> tuple[ArmSummary, ...]:
    """Summarize the attempts of each arm; they need their test losses."""
    random = statistics.fmean(a.test for a in attempts if a.arm == "random")
    reference = next(a.test for a in attempts if a.arm == "reference")
    found = []
    for arm in ARMS:
        own = [a for a in attempts if a.arm == arm]
        if not own:
            continue
        losses = [a.test for a in own]
        mean = statistics.fmean(losses)
        chosen = best_of(own)
        found.append(
            ArmSummary(
                arm=arm,
                n=len(own),
                infeasible=sum(bool(a.violated_start) for a in own),
                legal=sum(a.legal for a in own),
                mean=mean,
                sd=statistics.stdev(losses) if len(losses) > 1 else math.nan,
                least=min(losses),
                most=max(losses),
                excess=mean - reference,
                gap_closed=gap_closed(mean, random, reference),
                chosen=chosen.restart,
                chosen_ce=chosen.test,
                chosen_gap_closed=gap_closed(chosen.test, random, reference),
                tokens=_tokens(arm, attempts, len(own)),
            )
        )
    return tuple(found)


def _tokens(arm: str, attempts: Sequence[Attempt], n: int) -> float:
    """Mean tokens of an arm's restarts, with those of the stages that it builds on."""
    before = {"projected": ("soft",), "nearest": ("soft",), "repaired": ("soft", "projected")}
    arms = (arm, *before.get(arm, ()))
    return sum(a.tokens for a in attempts if a.arm in arms) / n


def best_of(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt of least validation loss, among the legal ones where there are any."""
    legal = [a for a in attempts if a.legal] or list(attempts)
    return min(legal, key=lambda a: (a.validation, a.restart))
