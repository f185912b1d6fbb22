"""A prompt that closes a behavior's gap: found on train prompts, scored on held-out ones.

Which prompts: to raise the gap (sign +1) those that do not show the behavior, the away side; to
lower it (-1) the toward side. A prompt counts as closed when sign * gap is above 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.arguments import MAX_PROMPTS, NULLS, Side, sign_of
from trimtab.behaviors.behavior import Behavior
from trimtab.errors import TrimtabError
from trimtab.evaluation.divergence import Reference, summarize
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.readout import readout_tokens
from trimtab.evaluation.summary import mean
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.gap.gradient import gradient_search
from trimtab.prompts.gap.readings import Reader
from trimtab.prompts.gap.sort_sum_stop import sort_sum_stop
from trimtab.prompts.gap.steps import Grown
from trimtab.prompts.scoring.objective import GapLoss
from trimtab.prompts.task.constraints import Bound, Constraints
from trimtab.prompts.task.rows import SEPARATORS, lay_out, slot_text
from trimtab.results import Progress
from trimtab.results.intervals import Interval, bootstrap, share_interval
from trimtab.results.registry import Registry
from trimtab.results.tables import Printable, Table, number, percent
from trimtab.steering.prompt import PromptSteering

METHODS: Registry[Callable[..., Grown]] = Registry("gap search method")
METHODS.register("sort")(sort_sum_stop)
METHODS.register("gradient")(gradient_search)
_ANSWER = 40


@dataclass(frozen=True)
class HeldOut:
    """What a slot does on prompts that the search never saw.

    Attributes:
        n: prompts.
        gap_before: mean of sign * gap without the slot.
        gap_after: with it.
        closed_before: share of prompts with sign * gap > 0 without it.
        closed: with it.
        judged: share of greedy answers that the judge gives to the wanted side; None without judge.
        judged_before: the same without the slot.
    """

    n: int
    gap_before: Interval
    gap_after: Interval
    closed_before: float
    closed: Interval
    judged: float | None
    judged_before: float | None


@dataclass(frozen=True)
class GapSearch(Printable):
    """A prompt that closes a gap, with what it does and what it costs.

    Attributes:
        behavior: its name.
        sign: +1 toward, -1 away.
        aggregator: of the gap.
        lever: the prompt, to be switched on.
        text: its text.
        found: the search's own trace, on train prompts.
        held_out: None where a single prompt was asked for.
        null: the same for random tokens in its place, (mean share closed, over so many draws).
        neutral_kl: KL per token along unsteered answers to neutral prompts, nats; None without any.
        perplexity: exp of the tokens' mean -log p in their place.
        seconds: of the search alone.
    """

    behavior: str
    sign: int
    aggregator: str
    lever: PromptSteering
    text: str
    found: Grown
    held_out: HeldOut | None
    null: tuple[float, int] | None
    neutral_kl: float | None
    perplexity: float
    seconds: float

    def table(self) -> Table:
        """Return one line per figure."""
        wanted = "toward" if self.sign > 0 else "away"
        rows: list[tuple[str, str]] = [
            ("text", repr(self.text)),
            ("slot", self.lever.slot),
            ("tokens", str(len(self.found.slot))),
            ("train: closed", percent(self.found.closed)),
        ]
        if self.held_out is not None:
            held = self.held_out
            rows += [
                ("held out: prompts", str(held.n)),
                ("held out: closed before", percent(held.closed_before)),
                ("held out: closed", held.closed.cell),
                ("held out: mean gap before", held.gap_before.cell),
                ("held out: mean gap", held.gap_after.cell),
                (f"held out: answers judged {wanted}, before", percent(held.judged_before)),
                (f"held out: answers judged {wanted}", percent(held.judged)),
            ]
        if self.null is not None:
            rows.append((f"closed by random tokens ({self.null[1]} draws)", percent(self.null[0])))
        rows += [
            ("predicted gain that came true", percent(self.found.additivity)),
            ("KL on neutral prompts, nats per token", number(self.neutral_kl, 3)),
            ("perplexity of the tokens", number(self.perplexity, 0)),
            ("prompts fed", str(self.found.sequences)),
            ("seconds", number(self.seconds, 1)),
        ]
        note = f"gap: sign {self.sign:+d} times (toward - away), {self.aggregator} of raw logits"
        title = f"{self.found.method} search: {self.behavior}, {wanted}; {self.found.stopped}"
        return Table(title, ("what", "figure"), tuple(rows), (note,))


def close_gap(
    lm: LanguageModel,
    behavior: Behavior,
    *,
    method: str = "sort",
    direction: Side = "toward",
    slot: str = "suffix",
    prompt: Prompt | None = None,
    aggregator: str = "logsumexp",
    constraints: Constraints | None = None,
    train_prompts: int = 16,
    max_prompts: int | None = MAX_PROMPTS,
    nulls: int = NULLS,
    max_tokens: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> GapSearch:
    """Search tokens that move a behavior's gap across zero.

    Args:
        lm: the model.
        behavior: its readout words, prompts and judge.
        method: `sort` (sort-sum-stop) or `gradient`.
        direction: `toward` raises the gap on away prompts, `away` lowers it on toward prompts.
        slot: `suffix`, `prefix` or `system`.
        prompt: close it for this prompt alone; nothing is held out then.
        aggregator: `logsumexp` or `max`.
        constraints: what the tokens may be; printable ASCII by default.
        train_prompts: most prompts that the search sees.
        max_prompts: most prompts of the test split that it is scored on; None for all.
        nulls: draws of random tokens.
        max_tokens: most tokens.
        seed: of the split and the nulls.
        progress: called with tokens in the slot and the most tokens.
        options: of the method.

    Raises:
        TrimtabError: an unknown method or direction, a behavior without readout words, or a search that
            found no token at all.
    """
    search = METHODS[method]
    sign = sign_of(direction)
    tokens = readout_tokens(lm, behavior)
    objective = GapLoss(tokens.toward, tokens.away, sign, aggregator)
    splits = behavior.split(seed)
    chosen = [prompt] if prompt is not None else _side(splits.train, sign, train_prompts)
    rows = lay_out(lm, chosen, slot)
    bound = (constraints or Constraints()).bind(lm, rows)
    started = time.perf_counter()
    reader = Reader(lm, rows, objective)
    found = search(reader, bound, max_tokens=max_tokens, progress=progress, **options)
    seconds = time.perf_counter() - started
    if not found.slot:
        raise TrimtabError(
            asked=f"tokens that move the gap of {behavior.name}",
            found=f"none: {found.stopped}",
            advice="try the other method or slot, or allow more tokens",
        )
    text = slot_text(lm, found.slot)
    lever = PromptSteering(
        text,
        slot=slot,
        separator=SEPARATORS[slot],
        provenance={"method": f"gap search, {method}", "behavior": behavior.name, "seed": seed},
    )
    held = null = None
    if prompt is None:
        unseen = _side(splits.test, sign, max_prompts)
        fresh = Reader(lm, lay_out(lm, unseen, slot), objective)
        held = _held_out(lm, behavior, lever, fresh, found.slot, unseen)
        null = _null(fresh, bound, len(found.slot), nulls, seed)
    return GapSearch(
        behavior=behavior.name,
        sign=sign,
        aggregator=aggregator,
        lever=lever,
        text=text,
        found=found,
        held_out=held,
        null=null,
        neutral_kl=_neutral_kl(lm, splits.test, lever),
        perplexity=math.exp(reader.slot_nll(found.slot)),
        seconds=seconds,
    )


def _side(behavior: Behavior, sign: int, most: int | None) -> list[Prompt]:
    """Prompts whose gap the sign is to change."""
    return [e.prompt for e in (behavior.away if sign > 0 else behavior.toward)[:most]]


def _held_out(
    lm: LanguageModel,
    behavior: Behavior,
    lever: PromptSteering,
    reader: Reader,
    slot: Sequence[int],
    prompts: list[Prompt],
) -> HeldOut:
    sign = reader.objective.sign
    # From the text, not from the tokens: what a user would paste.
    with lever.on(lm):
        encoded = [lm.encode(prompt) for prompt in prompts]
        answers = lm.generate(prompts, max_new_tokens=_ANSWER)
    wanted = [row.encoded(slot).ids for row in reader.rows]
    if [item.ids for item in encoded] != wanted:
        raise TrimtabError(
            asked=f"the tokens of {lever.text!r} on held-out prompts",
            found="a text that is tokenized otherwise there",
            advice="leave round_trip on and give the search more prompts",
        )
    after = sign * reader.read([slot]).gaps[0]
    before = sign * reader.bare.gaps[0]
    closed = (after > 0).double()
    share = float(closed.mean())
    judged = judged_before = None
    if behavior.judge is not None:
        evaluator = Evaluator(lm, behavior)
        plain = lm.generate(prompts, max_new_tokens=_ANSWER)
        judged, judged_before = (
            mean([answer.share(sign) for answer in evaluator.judged(prompts, said)])
            for said in (answers, plain)
        )
    return HeldOut(
        n=len(prompts),
        gap_before=Interval(float(before.mean()), *bootstrap(before)),
        gap_after=Interval(float(after.mean()), *bootstrap(after)),
        closed_before=float((before > 0).double().mean()),
        closed=Interval(share, *share_interval(closed)),
        judged=judged,
        judged_before=judged_before,
    )


def _null(reader: Reader, bound: Bound, length: int, draws: int, seed: int) -> tuple[float, int]:
    """The share of prompts that random legal tokens close, in the mean."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[int, ...]:
        places = torch.randint(len(bound.pool), (length,), generator=generator)
        return tuple(bound.pool[places].tolist())

    slots = bound.first_legal((drawn() for _ in range(200 * draws)), draws, depth=200)
    if not slots:
        return float("nan"), 0
    gaps = reader.objective.sign * reader.read(slots).gaps
    return float((gaps > 0).double().mean()), len(slots)


def _neutral_kl(lm: LanguageModel, behavior: Behavior, lever: PromptSteering) -> float | None:
    prompts = [e.prompt for e in behavior.neutral][:16]
    if not prompts:
        return None
    answers = lm.generate(prompts, max_new_tokens=_ANSWER)
    return summarize(Reference(lm, prompts, answers).kl(lever)).mean
