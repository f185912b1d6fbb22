"""Scores of a prompt lever against its teacher, on requests that the search never saw.

How likely it finds the reference's answers (cross-entropy, KL), how alike its own are (exact match,
exact@k, overlap@k), and whether they show the behavior (the judge, on greedy and sampled answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.behaviors.behavior import Behavior
from trimtab.evaluation.divergence import token_kl
from trimtab.evaluation.evaluate import Evaluator
from trimtab.evaluation.summary import mean
from trimtab.models.chat import Prompt
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.rows import PromptRow
from trimtab.prompts.task.teacher import answers_as_ids, switched, target_log_probs
from trimtab.results.intervals import ratio_bootstrap, share_interval, two_way_bootstrap
from trimtab.results.tables import Printable, Table, percent, with_interval
from trimtab.steering.vector import Switch

KS = (8, 24)
ANSWER = 48  # tokens of a judged answer
SAMPLING_SEEDS = (0, 1, 2)
SHOWN = 4  # greedy answers that are kept as text


@dataclass(frozen=True)
class Figure:
    """A mean over requests with its 95 % interval, requests resampled."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write the mean and the interval."""
        return with_interval(self.mean, self.low, self.high, 3)


@dataclass(frozen=True)
class Likelihood:
    """How a lever predicts the reference's answers, in nats per token.

    Attributes:
        ce: weighted cross-entropy of the reference's answers.
        excess: `ce` minus the reference prompt's own, which is not zero: greedy answers are not
            certain.
        kl: KL(reference || lever) over the whole vocabulary, unweighted mean over positions.
        n: number of requests.
    """

    ce: Figure
    excess: Figure
    kl: Figure
    n: int


@dataclass(frozen=True)
class Likeness:
    """How far a lever's own greedy answers are the reference's, in tokens.

    Attributes:
        exact: share of answers that are equal to the last token.
        exact_at: k -> share of answers whose first k tokens are equal.
        overlap_at: k -> share of the first k tokens that are equal, position by position.
    """

    exact: Figure
    exact_at: dict[int, Figure]
    overlap_at: dict[int, Figure]


@dataclass(frozen=True)
class Judged:
    """What the judge says of a lever's answers.

    Attributes:
        greedy: share of greedy answers that show the behavior.
        sampled: the same at temperature 1, over several seeds; seeds and requests resampled.
        coherence: mean soundness of the greedy answers.
        sampled_coherence: of the sampled ones.
        seeds: how many.
    """

    greedy: Figure
    sampled: Figure
    coherence: float
    sampled_coherence: float
    seeds: int


@dataclass(frozen=True)
class Scores(Printable):
    """All scores of one lever; `answers` are the first few greedy ones, as text."""

    label: str
    likelihood: Likelihood
    likeness: Likeness
    judged: Judged | None
    answers: tuple[tuple[str, str], ...]

    def table(self) -> Table:
        """Return one line per score."""
        like, own = self.likelihood, self.likeness
        rows = [
            ("cross-entropy, nats per token", str(like.ce)),
            ("excess over the reference's own", str(like.excess)),
            ("KL to the reference", str(like.kl)),
            ("exact match", str(own.exact)),
            *((f"exact@{k}", str(figure)) for k, figure in own.exact_at.items()),
            *((f"overlap@{k}", str(figure)) for k, figure in own.overlap_at.items()),
        ]
        if self.judged is not None:
            judged = self.judged
            rows += [
                ("judge, greedy", f"{judged.greedy}, coherence {percent(judged.coherence)}"),
                (
                    f"judge, sampled ({judged.seeds} seeds)",
                    f"{judged.sampled}, coherence {percent(judged.sampled_coherence)}",
                ),
            ]
        notes = (f"{like.n} requests; 95 % intervals over requests",)
        return Table(self.label, ("score", "mean [interval]"), tuple(rows), notes)


class Scorer:
    """Scores levers on the same rows; what the reference predicts is read once."""

    def __init__(
        self, lm: LanguageModel, reference: Switch, rows: Sequence[PromptRow], seed: int = 0
    ) -> None:
        """Take the teacher, and rows of held-out requests with its answers as targets."""
        self.lm, self.rows, self.seed = lm, list(rows), seed
        self._reference = [p.cpu() for p in target_log_probs(lm, reference, self.rows)]
        self._own = self._nll(self._reference)

    def likelihood(self, lever: Switch | None) -> Likelihood:
        """Score how a lever (None: no lever) predicts the reference's answers."""
        predicted = [p.cpu() for p in target_log_probs(self.lm, lever, self.rows)]
        nll = self._nll(predicted)
        weights = [sum(row.weights) for row in self.rows]
        excess = [a - b for a, b in zip(nll, self._own, strict=True)]
        kl = [token_kl(p, q) for p, q in zip(self._reference, predicted, strict=True)]
        return Likelihood(
            self._ratio(nll, weights),
            self._ratio(excess, weights),
            self._ratio([float(k.sum()) for k in kl], [len(k) for k in kl]),
            len(self.rows),
        )

    def likeness(self, lever: Switch | None, ks: Sequence[int] = KS) -> Likeness:
        """Score how far a lever's greedy answers are the reference's, on generated ids."""
        longest = max(len(row.target) for row in self.rows)
        answers = answers_as_ids(self.lm, lever, [row.request for row in self.rows], longest)
        return likeness(answers, [row.target for row in self.rows], ks, self.seed)

    def _nll(self, log_probs: Sequence[torch.Tensor]) -> list[float]:
        """Return sum_t w_t (-log p(y_t)) of each row, summed in float64."""
        sums = []
        for row, log_p in zip(self.rows, log_probs, strict=True):
            chosen = log_p[torch.arange(len(row.target)), list(row.target)].double()
            sums.append(-float(chosen @ torch.tensor(row.weights, dtype=torch.float64)))
        return sums

    def _ratio(self, sums: Sequence[float], counts: Sequence[float]) -> Figure:
        low, high = ratio_bootstrap(sums, counts, self.seed)
        return Figure(sum(sums) / sum(counts), low, high)


def likeness(
    answers: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> Likeness:
    """Compare answers with targets, token by token.

    Of a target of n tokens (its end token counted), the first min(k, n) positions are compared: the
    number is the target's alone, so an answer that stops early misses the rest.
    """
    pairs = list(zip(answers, targets, strict=True))
    exact = [float(tuple(answer) == tuple(target)) for answer, target in pairs]
    overlap = {k: [_overlap(answer, target, k) for answer, target in pairs] for k in ks}
    return Likeness(
        _share(exact, seed),
        {k: _share([float(x == 1.0) for x in values], seed) for k, values in overlap.items()},
        {k: _share(values, seed) for k, values in overlap.items()},
    )


def _overlap(answer: Sequence[int], target: Sequence[int], k: int) -> float:
    wanted = target[:k]
    return sum(a == b for a, b in zip(answer, wanted, strict=False)) / len(wanted)


def _share(values: Sequence[float], seed: int) -> Figure:
    low, high = share_interval(values, seed)
    return Figure(sum(values) / len(values), low, high)


def judged(
    lm: LanguageModel,
    lever: Switch | None,
    behavior: Behavior,
    rows: Sequence[PromptRow],
    *,
    side: str = "toward",
    max_new_tokens: int = ANSWER,
    seeds: Sequence[int] = SAMPLING_SEEDS,
    seed: int = 0,
) -> tuple[Judged, list[str]]:
    """Judge a lever's answers, greedy and sampled at temperature 1; return the greedy ones too.

    `seeds` are of the sampling, one run each, `seed` of the intervals.
    """
    evaluator, sign = Evaluator(lm, behavior), 1 if side == "toward" else -1
    requests = [row.request for row in rows]

    def run(temperature: float, sampling: int) -> tuple[list[str], list[float], list[float]]:
        texts = _answers(lm, lever, requests, max_new_tokens, temperature, sampling)
        answers = evaluator.judged(requests, texts)
        return texts, [a.share(sign) for a in answers], [a.coherence for a in answers]

    texts, shares, sound = run(0.0, 0)
    drawn = [run(1.0, one)[1:] for one in seeds]
    grid = torch.tensor([shown for shown, _ in drawn], dtype=torch.float64)
    low, high = two_way_bootstrap(grid, seed)
    found = Judged(
        _share(shares, seed),
        Figure(float(grid.mean()), low, high),
        mean(sound),
        mean([value for _, values in drawn for value in values]),
        len(seeds),
    )
    return found, texts


def score(
    lm: LanguageModel,
    lever: Switch | None,
    scorer: Scorer,
    behavior: Behavior | None = None,
    *,
    side: str = "toward",
    max_new_tokens: int = ANSWER,
    seeds: Sequence[int] = SAMPLING_SEEDS,
) -> Scores:
    """Return all scores of a lever (None: the bare model) on the scorer's rows.

    Without a behavior nothing is judged; `side` and `seeds` are as in `judged`.
    """
    rows, few = scorer.rows, [row.request for row in scorer.rows[:SHOWN]]
    verdict: Judged | None = None
    if behavior is None:
        texts = _answers(lm, lever, few, max_new_tokens)
    else:
        verdict, texts = judged(
            lm, lever, behavior, rows, side=side, max_new_tokens=max_new_tokens, seeds=seeds,
            seed=scorer.seed,
        )  # fmt: skip
    shown = tuple((_text(request), text) for request, text in zip(few, texts, strict=False))
    label = str(getattr(lever, "label", "no lever"))
    return Scores(label, scorer.likelihood(lever), scorer.likeness(lever), verdict, shown)


def _answers(
    lm: LanguageModel,
    lever: Switch | None,
    requests: list[Prompt],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    with switched(lm, lever):
        return lm.generate(requests, max_new_tokens, temperature, seed)


def _text(request: Prompt) -> str:
    if isinstance(request, str):
        return request
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in request)
